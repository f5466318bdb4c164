package host

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/guestagent/guestagent/internal/secret"
	"github.com/guestagent/guestagent/smbios"
)

// ErrVMM is matched where a command line is not one of cloud-hypervisor's that
// OEM strings can be added to.
var ErrVMM = errors.New("not a command line to add OEM strings to")

// An ExecConfig says what [PlanExec] adds to a command line.
type ExecConfig struct {
	OEMConfig
	// OnCommandLine says that the credentials may stand on the command line,
	// where every user of the host reads them.
	OnCommandLine bool
	// Args are cloud-hypervisor and its arguments.
	Args []string
}

// cloudHypervisor is the program's name; others begin with it and a '-', such
// as cloud-hypervisor-static.
const cloudHypervisor = "cloud-hypervisor"

// platformFlag is the option that has the OEM strings. It may stand once.
const platformFlag = "--platform"

// oemKey is its key for them.
const oemKey = "oem_strings="

// unfitForPlatform are the characters that cloud-hypervisor's parser takes for
// its own. Quotes do not help: versions 28 to 46 drop them where they stand in
// a list, and split at the comma between them all the same; versions from 50 on
// keep them as part of the string.
const unfitForPlatform = `,"[]`

// unfit reports whether a value cannot stand in a list as it is.
func unfit(value []byte) bool {
	s := string(value)
	return strings.ContainsAny(s, unfitForPlatform) || s != strings.TrimSpace(s)
}

// CheckVMM reports whether args are cloud-hypervisor and arguments with which
// it makes a VM that OEM strings can be added to. Its errors match [ErrVMM],
// and quote nothing.
func CheckVMM(args []string) error {
	_, _, err := findPlatform(args)
	return err
}

// findPlatform finds the value of --platform: its index among args, and where in
// that argument it begins. The index is 0 if there is none.
func findPlatform(args []string) (index, offset int, err error) {
	if len(args) == 0 {
		return 0, 0, fmt.Errorf("%w: there is no program", ErrVMM)
	}
	if name := filepath.Base(args[0]); name != cloudHypervisor && !strings.HasPrefix(name, cloudHypervisor+"-") {
		return 0, 0, fmt.Errorf("%w: the program is not cloud-hypervisor; for QEMU and crosvm there is guestctl boot-args", ErrVMM)
	}
	payload := false
	for i := 1; i < len(args); i++ {
		name, _, hasValue := strings.Cut(args[i], "=")
		switch name {
		case "--kernel", "--firmware", "--igvm":
			payload = true
		case "--restore":
			return 0, 0, fmt.Errorf("%w: with --restore the OEM strings are those of the snapshot", ErrVMM)
		case platformFlag:
			if index != 0 {
				return 0, 0, fmt.Errorf("%w: --platform stands twice, and cloud-hypervisor takes one", ErrVMM)
			}
			index, offset = i, len(platformFlag)+1
			if !hasValue {
				i++
				index, offset = i, 0
			}
			if index == len(args) {
				return 0, 0, fmt.Errorf("%w: --platform has no value", ErrVMM)
			}
		}
	}
	if !payload {
		return 0, 0, fmt.Errorf("%w: without --kernel, --firmware or --igvm cloud-hypervisor takes no notice of --platform; who makes the VM over its API socket gives the OEM strings there (platform.oem_strings)", ErrVMM)
	}
	return index, offset, nil
}

// PlanExec returns the program and its arguments with the OEM strings added to
// those that are there, and warnings, a line each. Credentials are an error
// unless OnCommandLine is set. No error has a value.
func PlanExec(c ExecConfig) (argv, warnings []string, err error) {
	index, offset, err := findPlatform(c.Args)
	if err != nil {
		return nil, nil, err
	}
	creds, err := c.credentials()
	if err != nil {
		return nil, nil, err
	}
	defer Wipe(creds)
	if len(creds) > 0 && !c.OnCommandLine {
		return nil, nil, fmt.Errorf("%d credentials, %s first, would stand on the command line of cloud-hypervisor, where every user of this host reads them: leave --dir out, and have the guest pull them (guestctl provide), or say --on-command-line",
			len(creds), creds[0].Name)
	}
	if c.Family == FamilySystemd {
		if err := checkPID1(creds); err != nil {
			return nil, nil, err
		}
	}
	strs, err := c.encode(creds, unfit)
	if err != nil {
		return nil, nil, err
	}
	defer wipeStrings(strs)
	added := make([]string, len(strs))
	for i, s := range strs {
		added[i] = string(s.value.Bytes())
		if j := strings.IndexAny(added[i], unfitForPlatform); j >= 0 {
			if s.name == "" {
				return nil, nil, fmt.Errorf("string %d has %q in it, which cloud-hypervisor cannot pass on; write it without", i+1, added[i][j])
			}
			return nil, nil, fmt.Errorf("credential %s has %q in its name, which cloud-hypervisor cannot pass on; rename it, or %s", s.name, added[i][j], pullHint)
		}
	}
	old := ""
	if index != 0 {
		old = c.Args[index][offset:]
	}
	merged, there, err := mergePlatform(old, added)
	if err != nil {
		return nil, nil, err
	}
	size := 0
	for _, s := range there {
		size += len(s) + 1
	}
	if err := checkStrings(strs, len(there), size, maxSmallTable); err != nil {
		return nil, nil, err
	}
	if name := c.firstTwice(there, strs); name != "" {
		return nil, nil, fmt.Errorf("credential %s stands in --platform already, and the first one wins; take it away there, or leave it out here", name)
	}
	argv = append(argv, c.Args...)
	if index != 0 {
		argv[index] = argv[index][:offset] + merged
	} else {
		argv = append([]string{argv[0], platformFlag, merged}, argv[1:]...)
	}
	if len(creds) > 0 {
		warnings = append(warnings, fmt.Sprintf("%d credentials stand on the command line of cloud-hypervisor: every user of this host can read them, and cloud-hypervisor writes them into snapshots", len(creds)))
	}
	return argv, append(warnings, c.warnings(strs)...), nil
}

// firstTwice returns the first credential of strs that is among there, too.
func (c *OEMConfig) firstTwice(there []string, strs []oemString) string {
	var t smbios.Table
	for _, s := range there {
		t.Strings = append(t.Strings, smbios.String{Value: secret.New([]byte(strings.ReplaceAll(s, `"`, "")))})
	}
	defer t.Wipe()
	creds, _ := smbios.Credentials(t)
	names := map[string]bool{}
	for _, cred := range creds {
		if cred.Value.Wipe(); string(cred.Family) == c.Family || c.Family == "" && cred.Family == smbios.FamilyAgent {
			names[cred.Name] = true
		}
	}
	for _, s := range strs {
		if names[s.name] {
			return s.name
		}
	}
	return ""
}

// splitOptions splits at commas, but those in quotes and brackets, as
// cloud-hypervisor does (split_commas in option_parser/src/lib.rs, v50).
func splitOptions(s string) ([]string, error) {
	var list []string
	begin, opened, quoted := 0, 0, false
	s = strings.TrimSpace(s)
	for i := range len(s) {
		switch c := s[i]; {
		case c == '"':
			quoted = !quoted
		case quoted:
		case c == '[':
			opened++
		case c == ']':
			if opened--; opened < 0 {
				return nil, fmt.Errorf("the value of --platform closes a bracket at byte %d that is not open", i+1)
			}
		case c == ',' && opened == 0:
			list = append(list, s[begin:i])
			begin = i + 1
		}
	}
	if quoted || opened > 0 {
		return nil, errors.New("the value of --platform does not close what it opens, a quote or a bracket")
	}
	return append(list, s[begin:]), nil
}

// oemElements are the strings of a list as cloud-hypervisor takes it apart
// (StringList in option_parser/src/lib.rs), without empty ones. Brackets but
// the two that stand around it are an error: what becomes of those depends on
// what follows.
func oemElements(list string) ([]string, error) {
	list = strings.TrimSpace(list)
	if body, ok := strings.CutPrefix(list, "["); ok {
		if list, ok = strings.CutSuffix(body, "]"); !ok {
			return nil, errors.New("the oem_strings in --platform have a bracket in a string")
		}
	}
	if strings.ContainsAny(list, "[]") {
		return nil, errors.New("the oem_strings in --platform have a bracket in a string")
	}
	all, err := splitOptions(list)
	if err != nil {
		return nil, err
	}
	var elements []string
	for _, s := range all {
		if s != "" { // in SMBIOS it would end the list
			elements = append(elements, s)
		}
	}
	return elements, nil
}

// mergePlatform adds strings to the oem_strings of a value of --platform, and
// returns those that were there. What else is there stays as it is. Where the
// key stands twice the last one counts, as for cloud-hypervisor.
func mergePlatform(platform string, added []string) (merged string, there []string, err error) {
	var options []string
	if strings.TrimSpace(platform) != "" {
		if options, err = splitOptions(platform); err != nil {
			return "", nil, err
		}
	}
	at := -1
	for i, o := range options {
		if strings.HasPrefix(o, oemKey) {
			at = i
		}
	}
	if at < 0 {
		at = len(options)
		options = append(options, oemKey)
	}
	if there, err = oemElements(options[at][len(oemKey):]); err != nil {
		return "", nil, err
	}
	options[at] = oemKey + "[" + strings.Join(append(there[:len(there):len(there)], added...), ",") + "]"
	return strings.Join(options, ","), there, nil
}

// Exec replaces this process by the program, which is looked up in PATH, with
// the same environment. It returns only what went wrong.
func Exec(argv []string) error {
	path, err := exec.LookPath(argv[0])
	if err != nil {
		return fmt.Errorf("looking for the program: %w", err)
	}
	// A signal that is ignored stays so across execve(2), and one that is caught
	// does not. This program ignores SIGPIPE.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	if err := syscall.Exec(path, argv, os.Environ()); err != nil { //nolint:gosec // that is what it is for
		return fmt.Errorf("starting %s: %w", path, err)
	}
	return nil
}
