package host

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/guestagent/guestagent/internal/secret"
	"github.com/guestagent/guestagent/smbios"
)

// credentialFolder makes a folder of credentials.
func credentialFolder(t *testing.T, values map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, v := range values {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(v), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// outFolder is where nothing is yet.
func outFolder(t *testing.T) string {
	t.Helper()
	return filepath.Join(t.TempDir(), "vm", "out")
}

// contents are the files of a folder.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		files[e.Name()] = string(b)
	}
	return files
}

// boot plans and writes.
func boot(t *testing.T, c BootConfig) (*Boot, map[string]string) {
	t.Helper()
	b, err := PlanBoot(c)
	if err != nil {
		t.Fatalf("PlanBoot: %v", err)
	}
	t.Cleanup(b.Wipe)
	if err := b.Write(); err != nil {
		t.Fatalf("Write: %v", err)
	}
	return b, contents(t, b.out)
}

// table is what a VMM makes of OEM strings.
func table(strs ...string) smbios.Table {
	var tab smbios.Table
	for _, s := range strs {
		tab.Strings = append(tab.Strings, smbios.String{Value: secret.New([]byte(s))})
	}
	return tab
}

// arrives checks that the strings have the credentials, and nothing else that
// could be one.
func arrives(t *testing.T, strs []string, family string, want map[string]string) {
	t.Helper()
	creds, refused := smbios.Credentials(table(strs...))
	got := map[string]string{}
	for _, c := range creds {
		if string(c.Family) != family {
			t.Errorf("credential %s is of family %q, want %q", c.Name, c.Family, family)
		}
		got[c.Name] = string(c.Value.Bytes())
	}
	if len(refused) > 0 || !maps.Equal(got, want) {
		t.Errorf("the guest has %q, refused %v, want %q", got, refused, want)
	}
}

var someValues = map[string]string{
	"api-key": "correct horse", "binary": "\x00\xff\n", "comma, and \"more\"": `a,b"c\[d]`, "empty": "", "line": "text\n",
}

func TestBootQEMU(t *testing.T) {
	for _, family := range []string{FamilyAgent, FamilySystemd} {
		out := filepath.Join(t.TempDir(), "a,b")
		b, files := boot(t, BootConfig{VMM: VMMQEMU, Out: out, OEMConfig: OEMConfig{
			Dir: credentialFolder(t, someValues), Family: family, Strings: []string{"io.guestagent.provider:vsock:2:1021", "x=1,y=2"},
		}})
		want := []string{"-smbios", "type=11,value=io.guestagent.provider:vsock:2:1021", "-smbios", "type=11,value=x=1,,y=2"}
		quoted := strings.ReplaceAll(out, ",", ",,")
		var strs []string
		for _, name := range slices.Sorted(maps.Keys(files)) {
			want = append(want, "-smbios", "type=11,path="+quoted+"/"+name)
			strs = append(strs, files[name])
		}
		if len(files) != len(someValues) || !slices.Equal(b.Args, want) {
			t.Errorf("arguments = %q, want %q", b.Args, want)
		}
		if len(b.Warnings) > 0 {
			t.Errorf("warnings = %q, want none", b.Warnings)
		}
		arrives(t, strs, family, someValues)
		if !slices.Contains(strs, "io."+family+".credential:api-key=correct horse") {
			t.Errorf("strings = %q, want text where it is printable", strs)
		}
		for _, s := range strs {
			if strings.ContainsAny(s, "\x00\n") {
				t.Errorf("string %q has what QEMU refuses, or keeps", s)
			}
		}
	}
}

func TestBootFwCfg(t *testing.T) {
	long := strings.Repeat("n", maxFwCfgName-len(fwCfgPrefix))
	values := map[string]string{"a,b": "\x00raw\n", long: ""}
	c := BootConfig{VMM: VMMQEMU, Out: outFolder(t), FwCfg: true, OEMConfig: OEMConfig{
		Dir: credentialFolder(t, values), Family: FamilySystemd, Strings: []string{"s"},
	}}
	b, files := boot(t, c)
	want := []string{
		"-fw_cfg", "name=opt/io.systemd.credentials/a,,b,file=" + c.Out + "/fw-cfg-000",
		"-fw_cfg", "name=opt/io.systemd.credentials/" + long + ",file=" + c.Out + "/fw-cfg-001",
		"-smbios", "type=11,value=s",
	}
	if !slices.Equal(b.Args, want) || files["fw-cfg-000"] != "\x00raw\n" || files["fw-cfg-001"] != "" || len(files) != 2 {
		t.Errorf("arguments = %q, files = %q, want %q", b.Args, files, want)
	}

	many := map[string]string{}
	for i := range maxFwCfgFiles + 1 {
		many[strings.Repeat("m", i+1)] = "v"
	}
	c.Dir = credentialFolder(t, many)
	if b, _ := boot(t, c); len(b.Warnings) != 1 || !strings.Contains(b.Warnings[0], "x-file-slots") {
		t.Errorf("warnings = %q, want one about the places", b.Warnings)
	}
	c.Dir = credentialFolder(t, map[string]string{long + "n": "hunter2"})
	if _, err := PlanBoot(c); err == nil || !strings.Contains(err.Error(), long+"n has a name of 29 bytes, and fw_cfg takes 28") {
		t.Errorf("PlanBoot with a long name = %v", err)
	}
	c.Family = FamilyAgent
	if _, err := PlanBoot(c); err == nil {
		t.Error("PlanBoot of fw_cfg for the agent: no error")
	}
}

func TestBootCrosvm(t *testing.T) {
	c := BootConfig{VMM: VMMCrosvm, Out: outFolder(t), OEMConfig: OEMConfig{
		Dir: credentialFolder(t, someValues), Strings: []string{`quote " and \`},
	}}
	b, files := boot(t, c)
	if want := []string{"--cfg", c.Out + "/crosvm.json"}; !slices.Equal(b.Args, want) || len(files) != 1 {
		t.Errorf("arguments = %q, files %q, want %q", b.Args, files, want)
	}
	if len(b.Warnings) != 1 || !strings.Contains(b.Warnings[0], "October 2025") {
		t.Errorf("warnings = %q, want one about versions", b.Warnings)
	}
	var doc struct {
		SMBIOS struct {
			Strings []string `json:"oem-strings"`
		} `json:"smbios"`
	}
	dec := json.NewDecoder(strings.NewReader(files[crosvmFile]))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&doc); err != nil || len(doc.SMBIOS.Strings) == 0 || doc.SMBIOS.Strings[0] != `quote " and \` {
		t.Fatalf("%s = %q, %v", crosvmFile, files[crosvmFile], err)
	}
	arrives(t, doc.SMBIOS.Strings, FamilyAgent, someValues)
}

func TestBootLimits(t *testing.T) {
	const value = "hunter2"
	many := map[string]string{}
	for i := range maxOEMStrings + 1 {
		many[strings.Repeat("a", i/16+1)+string(rune('a'+i%16))] = ""
	}
	fits := maxSmallTable - tableReserve - len("io.guestagent.credential:big=") - 1
	pages := map[string]string{"large": strings.Repeat(value, 30<<10/len(value)), "z": value}
	for i := range maxPID1Pages - 7 {
		pages[strings.Repeat("p", i/16+1)+string(rune('a'+i%16))] = "v"
	}
	for _, c := range []struct {
		name   string
		values map[string]string
		config BootConfig
		want   string // of the error; none if it is empty
	}{
		{"fits", map[string]string{"big": strings.Repeat("v", fits)}, BootConfig{}, ""},
		{"too large", map[string]string{"big": strings.Repeat("v", fits+1), "small": value}, BootConfig{}, "the largest is credential big with 57344 bytes: leave it out here, and have the guest pull it (guestctl provide); or say --large-table"},
		{"large table", map[string]string{"big": strings.Repeat("v", fits+1), "small": value}, BootConfig{LargeTable: true}, ""},
		{"too large for any", map[string]string{"big": strings.Repeat("v", maxLargeTable)}, BootConfig{LargeTable: true}, "fit an SMBIOS table of 256 KiB"},
		{"crosvm", map[string]string{"big": strings.Repeat("v", fits+1)}, BootConfig{VMM: VMMCrosvm}, "fit an SMBIOS table of 64 KiB"},
		{"many", many, BootConfig{}, "256 OEM strings are more than a VM can have, 255; have the guest pull"},
		{"PID 1's pages", pages, BootConfig{FwCfg: true, OEMConfig: OEMConfig{Family: FamilySystemd}}, "PID 1 has room for 1024 KiB"},
		{"name", map[string]string{"a=b": value}, BootConfig{}, `credential "a=b" as OEM string: not a credential name: byte 2 is '=', which ends a name there; leave it out here`},
		{"file name", map[string]string{"a:b": value}, BootConfig{}, "not a credential name: byte 2 of 3 is ':'; leave it out here"},
		{"value", map[string]string{"mib": strings.Repeat("v", 1<<20+1)}, BootConfig{}, "credential mib: more than 1048576 bytes; leave it out here"},
		{"none", map[string]string{".hidden": value}, BootConfig{}, "there is no file in"},
		{"no prefix", map[string]string{"a": value}, BootConfig{OEMConfig: OEMConfig{Prefix: "web."}}, "begins with the prefix"},
		{"no folder", map[string]string{"a": value}, BootConfig{Out: "-"}, "there is no folder to write"},
		{"control character", map[string]string{"a": value}, BootConfig{Out: "a\nb"}, "control character"},
		{"VMM", map[string]string{"a": value}, BootConfig{VMM: "bhyve"}, "no such VMM"},
		{"family", map[string]string{"a": value}, BootConfig{OEMConfig: OEMConfig{Family: "mine"}}, "no such family"},
		{"string", map[string]string{"a": value}, BootConfig{OEMConfig: OEMConfig{Strings: []string{""}}}, "string 1: it is empty"},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.config.Dir = credentialFolder(t, c.values)
			if c.config.VMM == "" {
				c.config.VMM = VMMQEMU
			}
			switch c.config.Out {
			case "":
				c.config.Out = outFolder(t)
			case "-":
				c.config.Out = ""
			}
			b, err := PlanBoot(c.config)
			if c.want == "" {
				if err != nil {
					t.Fatalf("PlanBoot = %v, want no error", err)
				}
				b.Wipe()
				return
			}
			if b != nil || err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), value) {
				t.Errorf("PlanBoot = %v, want an error with %q, and nothing of a value", err, c.want)
			}
			if _, err := os.Stat(c.config.Out); c.config.Out != "" && !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the folder was made: %v", err)
			}
		})
	}
}

// The way of guests with systemd before 257.
func TestBootOldSystemd(t *testing.T) {
	c := BootConfig{VMM: VMMQEMU, Out: outFolder(t), OEMConfig: OEMConfig{
		Dir: credentialFolder(t, map[string]string{"a": strings.Repeat("v", 2000), "b": strings.Repeat("v", 2100)}), Family: FamilySystemd,
	}}
	b, err := PlanBoot(c)
	if err != nil || len(b.Warnings) != 1 || !strings.Contains(b.Warnings[0], "loses credential b") {
		t.Errorf("PlanBoot for PID 1 = %v, %v, want a warning", b, err)
	}
	c.Family = FamilyAgent
	if b, err := PlanBoot(c); err != nil || len(b.Warnings) > 0 {
		t.Errorf("PlanBoot for the agent = %v, %v, want no warning", b, err)
	}
}

func TestCheckOEMStrings(t *testing.T) {
	if err := CheckOEMStrings([]string{"io.guestagent.provider:vsock:2:1021", "io.systemd.boot.kernel-cmdline-extra=quiet", "a, b"}); err != nil {
		t.Errorf("CheckOEMStrings = %v, want nil", err)
	}
	for _, s := range []string{
		"", " a", "a ", "a\nb", "a\x00", "é", "io.guestagent.hunter2:a", "io.guestagent.provide:vsock:2",
		"io.systemd.credential:a=hunter2", "io.systemd.credential.binary:a=hunter2", "io.systemd.credentials:a=hunter2",
		"io.guestagent.credential:a=hunter2", "io.guestagent.credential.binary:a=hunter2",
	} {
		err := CheckOEMStrings([]string{"good", s})
		if err == nil || !strings.HasPrefix(err.Error(), "string 2: ") || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("CheckOEMStrings(%q) = %v, want an error that does not quote", s, err)
		}
		if strings.Contains(s, ".credential") && !strings.Contains(err.Error(), "--dir") {
			t.Errorf("CheckOEMStrings(%q) = %v, want a way out", s, err)
		}
	}
}

func TestCheckShell(t *testing.T) {
	for arg, want := range map[string]bool{"type=11,path=/run/a,,b/oem-000": true, "a b": false, "a*": false, "[a]": false, "a\tb": false, `a\b`: false} {
		if err := (&Boot{Args: []string{"-smbios", arg}}).CheckShell(); (err == nil) != want {
			t.Errorf("CheckShell of %q = %v, want %v", arg, err, want)
		}
	}
}

func TestBootWrite(t *testing.T) {
	c := BootConfig{VMM: VMMQEMU, Out: outFolder(t), OEMConfig: OEMConfig{Dir: credentialFolder(t, map[string]string{"a": "1", "b": "2"})}}
	if err := os.MkdirAll(c.Out, 0o700); err != nil {
		t.Fatal(err)
	}
	elsewhere := filepath.Join(t.TempDir(), "elsewhere")
	if err := errors.Join(
		os.WriteFile(elsewhere, []byte("precious"), 0o600),
		os.Symlink(elsewhere, filepath.Join(c.Out, "oem-000")), // is replaced, not followed
		os.WriteFile(filepath.Join(c.Out, "oem-007"), nil, 0o600),
		os.WriteFile(filepath.Join(c.Out, "fw-cfg-000"), nil, 0o600),
		os.WriteFile(filepath.Join(c.Out, "crosvm.json"), nil, 0o600),
		os.WriteFile(filepath.Join(c.Out, ".guestctl-0123456789abcdef"), nil, 0o600),
		os.WriteFile(filepath.Join(c.Out, "notes"), []byte("somebody's"), 0o600),
		os.WriteFile(filepath.Join(c.Out, "oem-mine"), []byte("somebody's"), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		_, files := boot(t, c)
		want := map[string]string{
			"oem-000": "io.guestagent.credential:a=1", "oem-001": "io.guestagent.credential:b=2", "notes": "somebody's", "oem-mine": "somebody's",
		}
		if !maps.Equal(files, want) {
			t.Errorf("files = %q, want %q", files, want)
		}
	}
	if b, err := os.ReadFile(elsewhere); err != nil || string(b) != "precious" {
		t.Errorf("what a link pointed to = %q, %v", b, err)
	}
	for name, want := range map[string]fs.FileMode{".": fs.ModeDir | 0o700, "oem-000": 0o600, "oem-001": 0o600} {
		if st, err := os.Lstat(filepath.Join(c.Out, name)); err != nil || st.Mode() != want {
			t.Errorf("mode of %s = %v, %v, want %v", name, st.Mode(), err, want)
		}
	}
}

func TestBootWriteRefuses(t *testing.T) {
	dir := t.TempDir()
	creds := credentialFolder(t, map[string]string{"a": "hunter2"})
	if err := errors.Join(
		os.Mkdir(filepath.Join(dir, "open"), 0o700), os.Chmod(filepath.Join(dir, "open"), 0o755),
		os.Mkdir(filepath.Join(dir, "real"), 0o700), os.Symlink("real", filepath.Join(dir, "link")),
		os.WriteFile(filepath.Join(dir, "file"), nil, 0o600),
		os.Mkdir(filepath.Join(dir, "full"), 0o700), os.MkdirAll(filepath.Join(dir, "full", "oem-000", "x"), 0o700),
	); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"open": "has mode 0755", "link": "is a link", "file": "making the folder", "full": "writing"} {
		b, err := PlanBoot(BootConfig{VMM: VMMQEMU, Out: filepath.Join(dir, name), OEMConfig: OEMConfig{Dir: creds}})
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Write(); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("Write into %s = %v, want an error with %q", name, err, want)
		}
		if name == "full" {
			if left, _ := filepath.Glob(filepath.Join(dir, name, tempPrefix+"*")); len(left) > 0 {
				t.Errorf("left behind: %q", left)
			}
		}
	}
	if st, err := os.Stat(filepath.Join(dir, "open")); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("the mode of somebody's folder = %v, %v", st.Mode(), err)
	}
}

func TestBootOwner(t *testing.T) {
	out := outFolder(t)
	c := BootConfig{VMM: VMMQEMU, Out: filepath.Join(out, "vms", "web") + "/", OEMConfig: OEMConfig{Dir: credentialFolder(t, map[string]string{"a": "1"})}}
	for owner, want := range map[string]string{"no such user": "parsing the owner", "": "", "0:no such group": "parsing the owner", ":": "parsing the owner", "-1:-1": "parsing the owner"} {
		c.Owner = owner
		b, err := PlanBoot(c)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Write(); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("Write for %q = %v, want %q", owner, err, want)
		}
	}
	c.Owner = "64001:64002"
	b, err := PlanBoot(c)
	if err != nil {
		t.Fatal(err)
	}
	err = b.Write()
	if os.Geteuid() != 0 {
		if err == nil || !strings.Contains(err.Error(), "takes root") {
			t.Errorf("Write for somebody else = %v, want an error", err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]struct {
		mode     fs.FileMode
		uid, gid int
	}{".": {fs.ModeDir | 0o710, 0, 64002}, "oem-000": {0o600, 64001, 64002}} {
		st, err := os.Stat(filepath.Join(c.Out, name))
		if err != nil {
			t.Fatal(err)
		}
		if uid, gid := ids(st); st.Mode() != want.mode || uid != want.uid || gid != want.gid {
			t.Errorf("%s has mode %v and belongs to %d:%d, want %+v", name, st.Mode(), uid, gid, want)
		}
	}
	// The owner gets there.
	for _, dir := range []string{out, filepath.Join(out, "vms")} {
		if st, err := os.Stat(dir); err != nil || st.Mode().Perm() != 0o755 {
			t.Errorf("the folder %s has mode %v, %v, want 0755", dir, st.Mode(), err)
		}
	}
	// The same folder, for us again.
	c.Owner = ""
	boot(t, c)
	if st, err := os.Stat(c.Out); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("mode = %v, %v, want 0700", st.Mode(), err)
	}
	// A folder of somebody else is not taken.
	if err := os.Chown(c.Out, 64001, 64002); err != nil {
		t.Fatal(err)
	}
	if err := b.Write(); err == nil || !strings.Contains(err.Error(), "belongs to user 64001") {
		t.Errorf("Write into another's folder = %v", err)
	}
}

// A value that was encoded is not among what stays in memory after Wipe.
func TestBootWipe(t *testing.T) {
	for _, vmm := range []string{VMMQEMU, VMMCrosvm} {
		b, err := PlanBoot(BootConfig{VMM: vmm, Out: outFolder(t), OEMConfig: OEMConfig{Dir: credentialFolder(t, map[string]string{"a": "hunter2"})}})
		if err != nil {
			t.Fatal(err)
		}
		value := b.files[0].value.Bytes()
		if !bytes.Contains(value, []byte("hunter2")) {
			t.Fatalf("the file of %s has no value", vmm)
		}
		if b.Wipe(); bytes.Contains(value, []byte("hunter2")) || b.files[0].value.Len() != 0 {
			t.Errorf("the file of %s is not wiped", vmm)
		}
	}
}

func encoded(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }
