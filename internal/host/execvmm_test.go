package host

import (
	"errors"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// ids are a file's user and group.
func ids(st os.FileInfo) (uid, gid int) {
	sys := st.Sys().(*syscall.Stat_t)
	return int(sys.Uid), int(sys.Gid)
}

func TestMergePlatform(t *testing.T) {
	added := []string{"x=1", "y z"}
	for platform, want := range map[string]string{
		"":                                       "oem_strings=[x=1,y z]",
		"  ":                                     "oem_strings=[x=1,y z]",
		"uuid=1":                                 "uuid=1,oem_strings=[x=1,y z]",
		"oem_strings=[a]":                        "oem_strings=[a,x=1,y z]",
		"oem_strings=a":                          "oem_strings=[a,x=1,y z]",
		"oem_strings=":                           "oem_strings=[x=1,y z]",
		"oem_strings=[]":                         "oem_strings=[x=1,y z]",
		"oem_strings=[,a,,b,]":                   "oem_strings=[a,b,x=1,y z]",
		"oem_strings=[a,b],uuid=1":               "oem_strings=[a,b,x=1,y z],uuid=1",
		"iommu_segments=[1,2],oem_strings=[a]":   "iommu_segments=[1,2],oem_strings=[a,x=1,y z]",
		"oem_strings=[a],oem_strings=[b]":        "oem_strings=[a],oem_strings=[b,x=1,y z]", // the last one counts
		`serial_number="a,oem_strings=[",tdx=on`: `serial_number="a,oem_strings=[",tdx=on,oem_strings=[x=1,y z]`,
		`oem_strings=["a,b",c]`:                  `oem_strings=["a,b",c,x=1,y z]`,
		" oem_strings=[ a, b ] ":                 "oem_strings=[a, b,x=1,y z]",
	} {
		if got, _, err := mergePlatform(platform, added); err != nil || got != want {
			t.Errorf("mergePlatform(%q) = %q, %v, want %q", platform, got, err, want)
		}
	}
	for _, platform := range []string{"oem_strings=[a", "oem_strings=a]", `uuid="1`, "a=[[]", "]", "oem_strings=[a[b],c]", "oem_strings=[[a]]", "oem_strings=[a]b", `oem_strings="[a,b]"`, "oem_strings=[a]x[b]"} {
		if got, there, err := mergePlatform(platform, added); err == nil || got != "" || there != nil || strings.Contains(err.Error(), platform) {
			t.Errorf("mergePlatform(%q) = %q, %q, %v, want an error that does not quote", platform, got, there, err)
		}
	}
}

func TestPlanExec(t *testing.T) {
	const ch = "/usr/bin/cloud-hypervisor"
	dir := credentialFolder(t, map[string]string{"web.a": "hunter2", "web.b": "hunter2,\n", "other": "hunter3"})
	for _, c := range []struct {
		name   string
		config ExecConfig
		want   []string
	}{
		{
			"added",
			ExecConfig{OEMConfig: OEMConfig{Strings: []string{"s"}}, Args: []string{ch, "--kernel", "k", "--disk", "path=d"}},
			[]string{ch, "--platform", "oem_strings=[s]", "--kernel", "k", "--disk", "path=d"},
		}, {
			"merged",
			ExecConfig{OEMConfig: OEMConfig{Strings: []string{"s"}}, Args: []string{ch, "--platform", "uuid=1,oem_strings=[a]", "--firmware=f"}},
			[]string{ch, "--platform", "uuid=1,oem_strings=[a,s]", "--firmware=f"},
		}, {
			"merged behind =",
			ExecConfig{OEMConfig: OEMConfig{Strings: []string{"s"}}, Args: []string{ch, "--igvm", "i", "--platform=oem_strings=a"}},
			[]string{ch, "--igvm", "i", "--platform=oem_strings=[a,s]"},
		}, {
			"secrets",
			ExecConfig{
				OEMConfig: OEMConfig{Strings: []string{"s"}, Dir: dir, Prefix: "web."}, OnCommandLine: true,
				Args: []string{"cloud-hypervisor-static", "--kernel=k"},
			},
			[]string{
				"cloud-hypervisor-static", "--platform",
				"oem_strings=[s,io.guestagent.credential:a=hunter2,io.guestagent.credential.binary:b=" + encoded("hunter2,\n") + "]", "--kernel=k",
			},
		},
	} {
		before := slices.Clone(c.config.Args)
		argv, warnings, err := PlanExec(c.config)
		if err != nil || !slices.Equal(argv, c.want) {
			t.Errorf("%s: PlanExec = %q, %v, want %q", c.name, argv, err, c.want)
		}
		if (len(warnings) == 1) != c.config.OnCommandLine {
			t.Errorf("%s: warnings = %q", c.name, warnings)
		}
		if !slices.Equal(c.config.Args, before) {
			t.Errorf("%s: the arguments that were given are changed", c.name)
		}
	}
}

func TestPlanExecUnfit(t *testing.T) {
	values := map[string]string{"a": `,"[]`, "b": " ", "c": "x ", "d": " x", "e": "x", "f": ""}
	argv, _, err := PlanExec(ExecConfig{
		OEMConfig: OEMConfig{Dir: credentialFolder(t, values), Family: FamilySystemd}, OnCommandLine: true, Args: []string{"cloud-hypervisor", "--kernel=k"},
	})
	if err != nil {
		t.Fatal(err)
	}
	options, err := platformModel(argv[2])
	if err != nil {
		t.Fatal(err)
	}
	arrives(t, listModel(options[len(options)-1]), FamilySystemd, values)
}

func TestPlanExecRefuses(t *testing.T) {
	const ch = "cloud-hypervisor"
	good := []string{ch, "--kernel", "k"}
	secrets := credentialFolder(t, map[string]string{"api-key": "hunter2"})
	strs := OEMConfig{Strings: []string{"s"}}
	for _, c := range []struct {
		config ExecConfig
		usage  bool
		want   string
	}{
		{ExecConfig{OEMConfig: strs}, true, "there is no program"},
		{ExecConfig{OEMConfig: strs, Args: []string{"qemu-system-x86_64", "hunter2"}}, true, "guestctl boot-args"},
		{ExecConfig{OEMConfig: strs, Args: []string{"hunter2"}}, true, "is not cloud-hypervisor"},
		{ExecConfig{OEMConfig: strs, Args: []string{ch}}, true, "takes no notice of --platform"},
		{ExecConfig{OEMConfig: strs, Args: []string{ch, "--api-socket", "s"}}, true, "API socket"},
		{ExecConfig{OEMConfig: strs, Args: []string{ch, "--restore=hunter2"}}, true, "of the snapshot"},
		{ExecConfig{OEMConfig: strs, Args: append(good, "--platform")}, true, "has no value"},
		{ExecConfig{OEMConfig: strs, Args: append(good, "--platform=a=1", "--platform", "b=hunter2")}, true, "stands twice"},
		{ExecConfig{OEMConfig: strs, Args: append(good, "--platform=oem_strings=[hunter2")}, false, "does not close"},
		{ExecConfig{OEMConfig: OEMConfig{Strings: []string{"s", "a,b"}}, Args: good}, false, "string 2 has ',' in it"},
		{ExecConfig{OEMConfig: OEMConfig{Strings: []string{"io.systemd.credential:a=hunter2"}}, Args: good}, false, "--dir"},
		{ExecConfig{OEMConfig: OEMConfig{Dir: secrets}, Args: good}, false, "1 credentials, api-key first, would stand on the command line of cloud-hypervisor, where every user of this host reads them: leave --dir out, and have the guest pull them (guestctl provide)"},
		{
			ExecConfig{OEMConfig: OEMConfig{Dir: credentialFolder(t, map[string]string{"a[b": "hunter2"})}, OnCommandLine: true, Args: good},
			false, "credential a[b has '[' in its name",
		},
		{
			ExecConfig{OEMConfig: OEMConfig{Dir: secrets}, OnCommandLine: true, Args: append(good, "--platform=oem_strings=[io.guestagent.credential.binary:api-key=aHVudGVyMg==]")},
			false, "credential api-key stands in --platform already",
		},
		{
			ExecConfig{OEMConfig: OEMConfig{Dir: secrets}, OnCommandLine: true, Args: append(good, "--platform=oem_strings=["+strings.Repeat("hunter2,", maxOEMStrings)+"]")},
			false, "256 OEM strings are more",
		},
		{
			ExecConfig{OEMConfig: OEMConfig{Dir: credentialFolder(t, map[string]string{"big": strings.Repeat("hunter2", 9<<10)})}, OnCommandLine: true, Args: good},
			false, "the largest is credential big",
		},
		{
			ExecConfig{OEMConfig: strs, Args: append(good, "--platform=oem_strings="+strings.Repeat("hunter2", 9<<10))},
			false, "fit an SMBIOS table of 64 KiB",
		},
	} {
		argv, _, err := PlanExec(c.config)
		if argv != nil || err == nil || errors.Is(err, ErrVMM) != c.usage || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("PlanExec = %.40q, %v, want an error with %q, and nothing of a value", argv, err, c.want)
		}
		if got := errors.Is(CheckVMM(c.config.Args), ErrVMM); got != c.usage {
			t.Errorf("CheckVMM = %v, want %v (%s)", got, c.usage, c.want)
		}
	}
	// The same name for PID 1 has another owner.
	if _, _, err := PlanExec(ExecConfig{
		OEMConfig: OEMConfig{Dir: secrets}, OnCommandLine: true, Args: append(good, "--platform=oem_strings=[io.systemd.credential:api-key=x]"),
	}); err != nil {
		t.Errorf("PlanExec with the name in the other family = %v, want nil", err)
	}
}

// platformModel and listModel take a --platform apart as cloud-hypervisor
// does: split_commas, OptionParser::parse and StringList in its
// option_parser/src/lib.rs (v50). They are written after its text, not after
// ours.
func platformModel(s string) ([]string, error) {
	var list []string
	depth, quotes := 0, false
	current := []rune{}
	for _, c := range strings.TrimSpace(s) {
		switch c {
		case '"':
			quotes = !quotes
		case '[':
			if !quotes {
				depth++
			}
		case ']':
			if !quotes {
				if depth < 1 {
					return nil, errors.New("syntax")
				}
				depth--
			}
		case ',':
			if !quotes && depth == 0 {
				list = append(list, string(current))
				current = nil
				continue
			}
		}
		current = append(current, c)
	}
	if quotes || depth != 0 {
		return nil, errors.New("syntax")
	}
	return append(list, string(current)), nil
}

func listModel(option string) []string {
	_, value, _ := strings.Cut(option, "=")
	value = strings.TrimSpace(value)
	if value == "" {
		return nil
	}
	list, err := platformModel(strings.Trim(value, "[]"))
	if err != nil {
		return nil
	}
	return list
}

// oldListModel is StringList up to version 46, where split_commas had dropped
// the quotes.
func oldListModel(option string) []string {
	_, value, _ := strings.Cut(option, "=")
	if value = strings.TrimSpace(value); value == "" {
		return nil
	}
	return strings.Split(strings.Trim(value, "[]"), ",")
}

func nonEmpty(list []string) []string {
	return slices.DeleteFunc(slices.Clone(list), func(s string) bool { return s == "" })
}

// What was there stays there, for cloud-hypervisor, and what was added comes
// after it, whole.
func FuzzMergePlatform(f *testing.F) {
	for _, s := range []string{"", "uuid=1", "oem_strings=[a,b],uuid=1", `oem_strings=["a,b"],x="]"`, "oem_strings=[a[b]", "oem_strings=[],oem_strings=[ x ]", "a=[1,[2]],oem_strings=x", "oem_strings"} {
		f.Add(s, "io.guestagent.provider:vsock:2:1021", "x=1")
	}
	f.Fuzz(func(t *testing.T, platform, one, two string) {
		var added []string
		for _, s := range []string{one, two} {
			if checkOEMString(s) == nil && !unfit([]byte(s)) {
				added = append(added, s)
			}
		}
		merged, there, err := mergePlatform(platform, added)
		if err != nil {
			if merged != "" || there != nil {
				t.Errorf("mergePlatform(%q) = %q, %q beside an error", platform, merged, there)
			}
			return
		}
		var before []string
		if strings.TrimSpace(platform) != "" {
			if before, err = platformModel(platform); err != nil {
				t.Fatalf("mergePlatform(%q) = %q, and cloud-hypervisor refuses what was there", platform, merged)
			}
		}
		after, err := platformModel(merged)
		if err != nil {
			t.Fatalf("mergePlatform(%q) = %q, which cloud-hypervisor refuses", platform, merged)
		}
		last := func(options []string) int {
			for i, o := range slices.Backward(options) {
				if strings.HasPrefix(o, "oem_strings=") {
					return i
				}
			}
			return -1
		}
		var want []string
		at := last(before)
		if at < 0 {
			at = len(before)
			before = append(before, "oem_strings=")
		}
		want = append(nonEmpty(listModel(before[at])), added...)
		if got := nonEmpty(listModel(after[last(after)])); !slices.Equal(got, want) {
			t.Errorf("mergePlatform(%q) = %q, which has %q, want %q", platform, merged, got, want)
		}
		if !strings.ContainsAny(platform, `" `) && strings.TrimSpace(platform) == platform {
			want := append(nonEmpty(oldListModel(before[at])), added...)
			if got := nonEmpty(oldListModel(after[last(after)])); !slices.Equal(got, want) {
				t.Errorf("mergePlatform(%q) = %q, which has %q for an old version, want %q", platform, merged, got, want)
			}
		}
		if last(after) != at || len(after) != len(before) || !slices.Equal(slices.Delete(after, at, at+1), slices.Delete(before, at, at+1)) {
			t.Errorf("mergePlatform(%q) = %q, which has other options", platform, merged)
		}
		if again, _, err := mergePlatform(merged, nil); err != nil || again != merged {
			t.Errorf("mergePlatform(%q) = %q, %v, want the same", merged, again, err)
		}
	})
}
