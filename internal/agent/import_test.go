package agent

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/guestagent/guestagent/health"
	"github.com/guestagent/guestagent/internal/agent/agenttest"
	"github.com/guestagent/guestagent/internal/credential"
)

type guest struct {
	t    testing.TB
	a    *Agent
	root string
}

func newGuest(t testing.TB, oem ...string) *guest {
	t.Helper()
	g := &guest{t: t, root: t.TempDir()}
	g.a = &Agent{Version: "1.2.3", Root: g.root, confidential: func(context.Context) (string, error) { return "", nil }}
	if err := agenttest.WriteSMBIOS(g.root, oem...); err != nil {
		t.Fatal(err)
	}
	return g
}

func (g *guest) write(path, content string) {
	g.t.Helper()
	path = filepath.Join(g.root, path)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		g.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		g.t.Fatal(err)
	}
}

func (g *guest) imports() *Report {
	g.t.Helper()
	r, err := g.a.Import(g.t.Context(), false)
	if err != nil {
		g.t.Fatalf("Import: %v", err)
	}
	return r
}

// refusals are the report's, one line each, without the details.
func refusals(r *Report) []string {
	got := []string{}
	for _, f := range r.Refusals {
		got = append(got, f.Name+": "+string(f.Reason))
	}
	slices.Sort(got)
	return got
}

func entries(r *Report) []string {
	got := []string{}
	for _, e := range r.Entries {
		got = append(got, e.Name+": "+string(e.State))
	}
	return got
}

// codes are the report's reasons, but for the one that every test has that
// does not run on a file system in memory.
func codes(r *Report) []health.Code {
	var got []health.Code
	for _, n := range r.Reasons {
		if n.Code != health.StoreSwappable {
			got = append(got, n.Code)
		}
	}
	return got
}

func (g *guest) wantStore(want map[string]string) {
	g.t.Helper()
	got := map[string]string{}
	list, err := os.ReadDir(filepath.Join(g.root, pathStore))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		g.t.Fatal(err)
	}
	for _, e := range list {
		if e.IsDir() {
			continue
		}
		b, err := os.ReadFile(filepath.Join(g.root, pathStore, e.Name()))
		if err != nil {
			g.t.Fatal(err)
		}
		got[e.Name()] = string(b)
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		g.t.Errorf("store = %q, want %q", got, want)
	}
}

func wantEqual[T comparable](t testing.TB, what string, got, want []T) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s = %v, want %v", what, got, want)
	}
}

// Both families, the good beside the bad.
func TestImport(t *testing.T) {
	g := newGuest(
		t,
		"io.guestagent.credential:api-key=from the agent's family",
		"io.guestagent.credential.binary:raw="+base64.StdEncoding.EncodeToString([]byte{0, 1, 255}),
		"io.systemd.credential:taken=by PID 1",
		"io.systemd.credential:lost=on the way",
		"io.systemd.credential:cut=0123456789",
		"io.systemd.credential.binary:other=AAAA",
		"io.guestagent.credential:api-key=again",
		"io.guestagent.credential:a/b=x",
		"io.guestagent.credential.binary:broken=AA",
		"io.guestagent.credential:no separator",
		"io.guestagent.credental:typo=x",
		"io.guestagent.provider:vsock:2:1021",
		"com.example:ours=not yours",
		"io.guestagent.credential:taken=shadowed by PID 1's",
		"io.guestagent.credential:static=shadowed by a file",
		"io.guestagent.credential:theirs=somebody else's",
	)
	g.write("run/credentials/@system/taken", "by PID 1")
	g.write("run/credentials/@system/cut", "01234")
	g.write("run/credentials/@system/other", "fw_cfg")
	g.write("etc/credstore/static", "x")
	g.write("run/credstore/theirs", "untouched")
	r := g.imports()

	g.wantStore(map[string]string{"api-key": "from the agent's family", "raw": "\x00\x01\xff", "lost": "on the way", "theirs": "untouched"})
	wantEqual(t, "entries", entries(r), []string{
		"api-key: inForce", "cut: mismatch", "lost: inForce", "other: mismatch", "raw: inForce", "taken: inForce",
	})
	wantEqual(t, "refusals", refusals(r), []string{
		": badName", ": noSeparator", ": unknownKind", "api-key: duplicate", "broken: badBase64", "cut: mismatch", "other: mismatch",
		"static: shadowed", "taken: shadowed", "theirs: foreign",
	})
	if len(codes(r)) != 0 {
		t.Errorf("reasons = %+v", r.Reasons)
	}
	for name, want := range map[string]string{
		"cut":    "PID 1 has the first 5 of its 10 bytes in " + g.root + "/run/credentials/@system/cut",
		"other":  "pass it as io.guestagent.credential.binary:other=…",
		"static": "systemd finds " + g.root + "/etc/credstore/static first",
		"taken":  "systemd finds " + g.root + "/run/credentials/@system/taken first",
		"theirs": g.root + "/run/credstore/theirs is somebody else's",
	} {
		if !slices.ContainsFunc(r.Refusals, func(f credential.Refusal) bool { return f.Name == name && strings.Contains(f.Detail, want) }) {
			t.Errorf("refusals = %+v, want %q for %s", r.Refusals, want, name)
		}
	}

	// Running again changes nothing and says the same.
	again := g.imports()
	if again.Generation != 1 {
		t.Errorf("generation after a second import = %d, want 1", again.Generation)
	}
	wantEqual(t, "refusals of the second import", refusals(again), refusals(r))
	wantEqual(t, "entries of the second import", entries(again), entries(r))

	// And so does status.
	s, err := g.a.Status()
	if err != nil {
		t.Fatalf("Status: %v", err)
	}
	wantEqual(t, "refusals in the status", refusals(s), refusals(r))
	wantEqual(t, "entries in the status", entries(s), entries(r))
	if s.ImportedAt == nil || !s.ImportedAt.Equal(*again.ImportedAt) || s.SMBIOS != r.SMBIOS || s.SMBIOS.Strings != 16 {
		t.Errorf("status = %+v, want the import's", s)
	}
}

func TestImportDryRun(t *testing.T) {
	g := newGuest(t, "io.guestagent.credential:a=x", "io.guestagent.credential:b/c=x")
	r, err := g.a.Import(t.Context(), true)
	if err != nil || !r.DryRun {
		t.Fatalf("Import = %+v, %v", r, err)
	}
	wantEqual(t, "entries", entries(r), []string{"a: wouldInstall"})
	wantEqual(t, "refusals", refusals(r), []string{": badName"})
	if _, err := os.Stat(filepath.Join(g.root, "run")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a dry run made something: %v", err)
	}
}

func TestImportNotRead(t *testing.T) {
	oem := "io.guestagent.credential:a=x"
	t.Run("none", func(t *testing.T) {
		g := newGuest(t, oem)
		if err := os.RemoveAll(filepath.Join(g.root, "sys")); err != nil {
			t.Fatal(err)
		}
		wantEqual(t, "reasons", codes(g.imports()), []health.Code{health.NoSMBIOS})
	})
	t.Run("confidential", func(t *testing.T) {
		g := newGuest(t, oem)
		g.a.confidential = func(context.Context) (string, error) { return "sev-snp", nil }
		r := g.imports()
		wantEqual(t, "reasons", codes(r), []health.Code{health.Confidential})
		if !strings.Contains(r.Reasons[0].Detail+r.Reasons[len(r.Reasons)-1].Detail, "sev-snp") {
			t.Errorf("reasons = %+v", r.Reasons)
		}
		g.wantStore(nil)
		g.write(pathConfig, `{"smbios": {"read": "always"}}`)
		wantEqual(t, "reasons", codes(g.imports()), nil)
		g.wantStore(map[string]string{"a": "x"})
	})
	t.Run("unknown", func(t *testing.T) {
		g := newGuest(t, oem)
		g.a.confidential = func(context.Context) (string, error) { return "", errors.New("no answer") }
		r, err := g.a.Import(t.Context(), false)
		if err == nil {
			t.Error("Import succeeded")
		}
		wantEqual(t, "reasons", codes(r), []health.Code{health.Confidential})
		g.wantStore(nil)
	})
	t.Run("off", func(t *testing.T) {
		g := newGuest(t, oem)
		g.write(pathConfig, `{"smbios": {"read": "never"}}`)
		wantEqual(t, "reasons", codes(g.imports()), []health.Code{health.SMBIOSOff})
		g.wantStore(nil)
	})
	t.Run("too large", func(t *testing.T) {
		g := newGuest(t, oem)
		g.write("sys/firmware/dmi/tables/DMI", strings.Repeat("x", 4<<20+1))
		r, err := g.a.Import(t.Context(), false)
		if err == nil {
			t.Error("Import succeeded")
		}
		wantEqual(t, "reasons", codes(r), []health.Code{health.SMBIOSUnreadable})
		s, err := g.a.Status()
		if err != nil {
			t.Fatal(err)
		}
		wantEqual(t, "reasons in the status", codes(s), []health.Code{health.SMBIOSUnreadable})
	})
	t.Run("PID 1 is told not to", func(t *testing.T) {
		g := newGuest(t, oem, "io.systemd.credential:b=x")
		g.write(pathCmdline, "quiet systemd.import_credentials=no\n")
		r := g.imports()
		wantEqual(t, "refusals", refusals(r), []string{"b: disabled"})
		g.wantStore(map[string]string{"a": "x"})
	})
	t.Run("both families", func(t *testing.T) {
		g := newGuest(t, "io.systemd.credential:a=PID 1 missed it", oem)
		wantEqual(t, "refusals", refusals(g.imports()), []string{"a: duplicate"})
		g.wantStore(map[string]string{"a": "x"})
	})
}

// A fault in the configuration costs its key and is reported; the rest is done.
func TestImportWithFaultyConfig(t *testing.T) {
	g := newGuest(t, "io.guestagent.credential:a=x")
	g.write(pathConfig, "{\"smbios\": {\"read\": 1},\n\"nonsense\": true}")
	r := g.imports()
	wantEqual(t, "reasons", codes(r), []health.Code{health.ConfigFault, health.ConfigFault})
	g.wantStore(map[string]string{"a": "x"})
}

// What is asked before anything is imported.
func TestStatusBeforeImport(t *testing.T) {
	g := newGuest(t)
	r, err := g.a.Status()
	if err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "reasons", codes(r), []health.Code{health.NotImported})
	b, err := json.Marshal(r)
	if err != nil || strings.Contains(string(b), "null") {
		t.Errorf("json = %s, %v", b, err)
	}
}

// No report, in no form, holds a value.
func TestReportHoldsNoValue(t *testing.T) {
	g := newGuest(
		t,
		"io.guestagent.credential:a=hunter2", "io.guestagent.credential:a=hunter2", "io.guestagent.credential:x/y=hunter2",
		"io.guestagent.credential:hunter2 without a name", "io.systemd.credential:m=hunter2", "io.guestagent.hunter2",
		"io.guestagent.credential.binary:b=hunter2!", "io.guestagent.credential:theirs=hunter2",
	)
	g.write("run/credentials/@system/m", "hunter2 differs")
	g.write("run/credstore/theirs", "hunter2")
	r := g.imports()
	var text strings.Builder
	if err := r.WriteText(&text, ""); err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	own, err := os.ReadDir(filepath.Join(g.root, pathStore, ".guestagent"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range own {
		c, err := os.ReadFile(filepath.Join(g.root, pathStore, ".guestagent", e.Name()))
		if err == nil {
			b = append(b, c...)
		}
	}
	if s := text.String() + string(b) + fmt.Sprintf("%+v", r); strings.Contains(s, "hunter2") {
		t.Errorf("the report shows a value: %s", s)
	}
}

// Without a systemd to ask, and without a device of such a VM, it is none.
func TestAskConfidential(t *testing.T) {
	g := newGuest(t)
	if kind, err := g.a.askConfidential(t.Context()); err != nil || kind != "" {
		t.Errorf("askConfidential = %q, %v", kind, err)
	}
	for path, want := range map[string]string{pathTDXGuest: "tdx", pathSevGuest: "sev-snp"} {
		g := newGuest(t)
		g.write(path+"/x", "")
		if kind, err := g.a.askConfidential(t.Context()); err != nil || kind != want {
			t.Errorf("askConfidential with %s = %q, %v, want %q", path, kind, err, want)
		}
	}
	// Something that is there and does not answer is no answer.
	g.write(pathPID1Socket, "")
	if kind, err := g.a.askConfidential(t.Context()); err == nil {
		t.Errorf("askConfidential of a file = %q, want an error", kind)
	}
}

// BenchmarkImport imports a typical table: ten credentials of 100 bytes, five
// of each family.
func BenchmarkImport(b *testing.B) {
	var oem []string
	for i := range 5 {
		oem = append(oem, fmt.Sprintf("io.guestagent.credential:agent-%d=%s", i, strings.Repeat("v", 100)))
		oem = append(oem, fmt.Sprintf("io.systemd.credential:systemd-%d=%s", i, strings.Repeat("v", 100)))
	}
	for name, prepare := range map[string]func(*guest){
		"first": func(g *guest) {
			if err := os.RemoveAll(filepath.Join(g.root, pathStore)); err != nil {
				b.Fatal(err)
			}
		},
		"again": func(*guest) {},
	} {
		b.Run(name, func(b *testing.B) {
			g := newGuest(b, oem...)
			for i := range 5 {
				g.write(fmt.Sprintf("run/credentials/@system/systemd-%d", i), strings.Repeat("v", 100))
			}
			b.ReportAllocs()
			for b.Loop() {
				b.StopTimer()
				prepare(g)
				b.StartTimer()
				if r := g.imports(); len(r.Entries) != 10 {
					b.Fatalf("%d entries", len(r.Entries))
				}
			}
		})
	}
}
