package vm_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/guestagent/guestagent/internal/host"
	"github.com/guestagent/guestagent/tests/vm"
	"github.com/guestagent/guestagent/tests/vm/vmtest"
	"github.com/guestagent/guestagent/vsockrpc"
)

const (
	agentTarget  = "unix:/run/guestagent/varlink.sock"
	agentService = "guestagent.service"
	agentConfig  = "/etc/guestagent/config.json"
	credSocket   = "/run/guestagent/credentials.sock"
	// unitDir is one that systemctl mask works on.
	unitDir = "/usr/lib/systemd/system/"

	// waitLimit bounds a wait for what is certain to come, pollEvery is how often a guest is asked for it.
	waitLimit = 2 * time.Minute
	pollEvery = 20 * time.Millisecond
)

// A renderer keeps what it has rendered, by the NixOS configuration's file.
type renderer struct {
	mu    sync.Mutex
	files map[string][]vm.File
}

var nixos = renderer{files: map[string][]vm.File{}}

// rendered is what a NixOS configuration comes to in a guest, as [vm.Rendered] has it.
func rendered(t testing.TB, config string) []vm.File {
	t.Helper()
	nixos.mu.Lock()
	defer nixos.mu.Unlock()
	if files, ok := nixos.files[config]; ok {
		return slices.Clone(files)
	}
	files, err := vm.Rendered(t.Context(), config, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for i, f := range files {
		if f.Source == "" {
			continue
		}
		content, err := os.ReadFile(f.Source) // which goes with this test
		if err != nil {
			t.Fatal(err)
		}
		files[i].Content, files[i].Source = content, ""
	}
	nixos.files[config] = files
	return slices.Clone(files)
}

// nixosDropIn is a drop-in that NixOS adds to one of the agent's units where it is asked to.
func nixosDropIn(t testing.TB, unit, name string) vm.File {
	t.Helper()
	files := rendered(t, "testdata/nixos/guest-drop-ins.nix")
	i := slices.IndexFunc(files, func(f vm.File) bool { return f.Path == "/etc/systemd/system/"+unit+".d/"+name })
	if i < 0 {
		t.Fatalf("NixOS adds no %s to %s", name, unit)
	}
	return files[i]
}

// withGuestctl adds guestctl to a machine's files.
func withGuestctl(t testing.TB, files []vm.File) []vm.File {
	t.Helper()
	return append(files, vm.File{Path: "/usr/bin/guestctl", Mode: 0o755, Source: vmtest.Binary(t, "github.com/guestagent/guestagent/cmd/guestctl")})
}

// agentFiles is what a machine of these tests has besides its image: the agent, and guestctl.
func agentFiles(t testing.TB) []vm.File {
	t.Helper()
	return withGuestctl(t, install(t))
}

// eachContainer runs f in a container of each release that VM asks for, one after another.
func eachContainer(t *testing.T, f func(t *testing.T, m *vm.Machine, release vm.Release)) {
	t.Helper()
	vmtest.Releases(t) // skips before anything is built
	files := agentFiles(t)
	vmtest.Each(t, func(t *testing.T, release vm.Release) {
		f(t, vmtest.StartContainer(t, vm.ContainerConfig{Image: vmtest.Image(t, release), Overlay: files}), release)
	})
}

// allContainers is eachContainer in all of them at the same time, for tests that mostly wait.
func allContainers(t *testing.T, f func(t *testing.T, m *vm.Machine, release vm.Release)) {
	t.Helper()
	vmtest.Releases(t) // skips before anything is built
	files := agentFiles(t)
	vmtest.Each(t, func(t *testing.T, release vm.Release) {
		t.Parallel()
		f(t, vmtest.StartContainer(t, vm.ContainerConfig{Image: vmtest.Image(t, release), Overlay: files}), release)
	})
}

// creds are values by name.
type creds map[string][]byte

// newValue makes a value that nothing else has. Like all values of these tests it holds mark.
func newValue() []byte { return []byte(mark + "-" + rand.Text()) }

// An answer is what guestctl --json said of one guest.
type answer struct {
	host.Result
	exit   int
	stderr string
}

// ctl runs guestctl in the guest. The value of a credential goes to its standard input.
func ctl(t testing.TB, m *vm.Machine, stdin []byte, args ...string) answer {
	t.Helper()
	a, err := runCtl(t.Context(), m, stdin, args...)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// runCtl is ctl for a goroutine of its own. A guestctl that does not end is killed.
func runCtl(ctx context.Context, m *vm.Machine, stdin []byte, args ...string) (answer, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*waitLimit)
	defer cancel()
	command := args[0]
	argv := append([]string{"guestctl", "--json", command, agentTarget}, args[1:]...)
	res, err := m.Exec(ctx, vm.Command{Argv: argv, Stdin: stdin})
	if err != nil {
		return answer{}, err
	}
	a := answer{exit: res.ExitCode, stderr: string(res.Stderr)}
	if len(res.Stdout) > 0 {
		if err := json.Unmarshal(res.Stdout, &a.Result); err != nil {
			return a, fmt.Errorf("decoding what guestctl %s said: %w", command, err)
		}
	}
	return a, nil
}

// encode is the set as --json-file takes it.
func (c creds) encode() []byte {
	type one struct {
		Name string `json:"name"`
		Data []byte `json:"data"`
	}
	var set []one
	for name, value := range c {
		set = append(set, one{name, value})
	}
	b, err := json.Marshal(map[string][]one{"systemd.credentials": set})
	if err != nil {
		panic(err) // strings and bytes
	}
	return b
}

// push puts a set in force, with guestctl push and the flags.
func push(t testing.TB, m *vm.Machine, set creds, flags ...string) answer {
	t.Helper()
	return ctl(t, m, set.encode(), append([]string{"push", "--json-file", "-"}, flags...)...)
}

// mustPush is push where anything but success is a fault.
func mustPush(t testing.TB, m *vm.Machine, set creds, flags ...string) answer {
	t.Helper()
	a := push(t, m, set, flags...)
	a.want(t, 0, "")
	return a
}

// startPush is push in the background. The function that it returns waits for the answer.
func startPush(t testing.TB, m *vm.Machine, set creds, flags ...string) func() answer {
	t.Helper()
	type result struct {
		answer
		err error
	}
	done := make(chan result, 1)
	ctx := t.Context()
	go func() {
		a, err := runCtl(ctx, m, set.encode(), append([]string{"push", "--json-file", "-"}, flags...)...)
		done <- result{a, err}
	}()
	return func() answer {
		t.Helper()
		r := <-done
		if r.err != nil {
			t.Fatal(r.err)
		}
		return r.answer
	}
}

// want checks guestctl's exit status and the code of its error, "" for none.
func (a answer) want(t testing.TB, exit int, code host.Code) {
	t.Helper()
	var got host.Code
	if a.Error != nil {
		got = a.Error.Code
	}
	if a.exit != exit || got != code {
		t.Fatalf("guestctl: exit status %d with %q, want %d with %q\n%s", a.exit, got, exit, code, a.stderr)
	}
}

// units are the units of the answer, each with what was done and what came of it.
func (a answer) units() []string {
	var lines []string
	for _, u := range a.Units {
		lines = append(lines, u.Unit+" "+u.Action+" "+u.Result)
	}
	slices.Sort(lines)
	return lines
}

// wantUnits checks which units were refreshed, given as "UNIT ACTION RESULT".
func (a answer) wantUnits(t testing.TB, want ...string) {
	t.Helper()
	slices.Sort(want)
	if got := a.units(); !slices.Equal(got, want) {
		t.Errorf("units:\n  %s\nwant:\n  %s\n%s", strings.Join(got, "\n  "), strings.Join(want, "\n  "), a.stderr)
	}
}

// detail is what the answer says about a unit.
func (a answer) detail(t testing.TB, unit string) string {
	t.Helper()
	for _, u := range a.Units {
		if u.Unit == unit {
			return u.Detail
		}
	}
	t.Errorf("no word of %s in %v", unit, a.units())
	return ""
}

// list asks for everything that there is, with the consumers.
func list(t testing.TB, m *vm.Machine) answer {
	t.Helper()
	a := ctl(t, m, nil, "list")
	a.want(t, 0, "")
	if a.ConsumersProblem != "" {
		t.Fatalf("list: consumers are not known: %s", a.ConsumersProblem)
	}
	return a
}

// consumersOf are the consumers of one credential.
func (a answer) consumersOf(t testing.TB, name string) []vsockrpc.Consumer {
	t.Helper()
	for _, e := range a.Entries {
		if e.Name == name {
			return e.Consumers
		}
	}
	t.Fatalf("list has no %s", name)
	return nil
}

// consumerOf is what a list says of a unit and a credential.
func consumerOf(t testing.TB, m *vm.Machine, unit, name string) vsockrpc.Consumer {
	t.Helper()
	all := list(t, m).consumersOf(t, name)
	for _, c := range all {
		if c.Unit == unit {
			return c
		}
	}
	t.Fatalf("%s is no consumer of %s: %+v", unit, name, all)
	return vsockrpc.Consumer{}
}

// wantLoaded checks what a list says of what a unit has loaded.
func wantLoaded(t testing.TB, m *vm.Machine, unit, name, loaded string, stale bool) {
	t.Helper()
	if c := consumerOf(t, m, unit, name); c.Loaded != loaded || c.Stale != stale {
		t.Errorf("list says of %s and %s: loaded %s, stale %v, want %s, %v", unit, name, c.Loaded, c.Stale, loaded, stale)
	}
}

// lines is a unit file, without comments and the like.
func lines(s ...string) string { return strings.Join(s, "\n") + "\n" }

// loads is a service that runs and does nothing, with the settings.
func loads(settings ...string) string {
	return lines(append([]string{"[Service]", "Type=exec", "ExecStart=/usr/bin/sleep infinity"}, settings...)...)
}

// bySocket is LoadCredential= over the agent's socket, with what goes with it. It ends in another section: it comes last.
func bySocket(names ...string) string {
	var s []string
	for _, name := range names {
		s = append(s, "LoadCredential="+name+":"+credSocket, "ExecStartPre=/usr/bin/test -s ${CREDENTIALS_DIRECTORY}/"+name)
	}
	return lines(s...) + lines("[Unit]", "After=guestagent-credentials.socket")
}

// atEnd runs a program in the guest at the end of the test, the one that was named last first. A failure is no more than
// told of: the machine may have ended.
func atEnd(t testing.TB, m *vm.Machine, argv ...string) {
	t.Helper()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), waitLimit)
		defer cancel()
		res, err := m.Run(ctx, argv...)
		if err != nil || res.ExitCode != 0 {
			t.Logf("%q at the end: %v, exit status %d\n%s", argv, err, res.ExitCode, res.Stderr)
		}
	})
}

// addUnits writes unit files, by name, and has systemd load them. At the end of the test they are stopped, removed and
// forgotten. A template's instances are the caller's to stop.
func addUnits(t testing.TB, m *vm.Machine, files map[string]string) {
	t.Helper()
	var names []string
	for name, content := range files {
		vmtest.WriteFile(t, m, unitDir+name, 0o644, []byte(content))
		names = append(names, name)
	}
	slices.Sort(names)
	vmtest.Run(t, m, "systemctl", "daemon-reload")
	var patterns, paths []string
	for _, name := range names {
		if strings.Contains(name, "/") { // a drop-in
			paths = append(paths, unitDir+path.Dir(name))
			continue
		}
		patterns, paths = append(patterns, strings.Replace(name, "@.", "@*.", 1)), append(paths, unitDir+name)
	}
	atEnd(t, m, "systemctl", "daemon-reload")
	atEnd(t, m, append([]string{"rm", "-rf"}, paths...)...)
	if len(patterns) > 0 {
		// Of a unit that systemd has forgotten it says that it is not loaded.
		atEnd(t, m, "sh", "-c", "systemctl reset-failed "+strings.Join(patterns, " ")+" 2>/dev/null || true")
		atEnd(t, m, append([]string{"systemctl", "stop"}, patterns...)...)
	}
}

// removeCreds removes credentials at the end of the test.
func removeCreds(t testing.TB, m *vm.Machine, names ...string) {
	t.Helper()
	atEnd(t, m, append([]string{"guestctl", "rm", agentTarget, "--refresh", "none"}, names...)...)
}

// configure writes the agent's configuration and starts the agent on it. At the end of the test both are as before.
func configure(t testing.TB, m *vm.Machine, config string) {
	t.Helper()
	atEnd(t, m, "systemctl", "restart", agentService)
	atEnd(t, m, "mv", agentConfig+".before", agentConfig)
	vmtest.Run(t, m, "cp", agentConfig, agentConfig+".before")
	vmtest.WriteFile(t, m, agentConfig, 0o644, []byte(config))
	vmtest.Run(t, m, "systemctl", "restart", agentService)
}

// start starts units and waits until they have started.
func start(t testing.TB, m *vm.Machine, units ...string) {
	t.Helper()
	vmtest.Run(t, m, append([]string{"systemctl", "start"}, units...)...)
}

// mainPID is a running service's process.
func mainPID(t *testing.T, m *vm.Machine, unit string) int {
	t.Helper()
	pid, err := strconv.Atoi(show(t, m, unit, "MainPID"))
	if err != nil || pid == 0 {
		t.Fatalf("%s has no process: %v", unit, err)
	}
	return pid
}

// wantActive checks a unit's ActiveState.
func wantActive(t *testing.T, m *vm.Machine, unit, want string) {
	t.Helper()
	if got := show(t, m, unit, "ActiveState"); got != want {
		t.Errorf("%s is %s, want %s", unit, got, want)
	}
}

// wantGiven checks what a running service's process finds in its $CREDENTIALS_DIRECTORY, and shows none of it.
func wantGiven(t *testing.T, m *vm.Machine, unit, name string, want []byte) {
	t.Helper()
	file := fmt.Sprintf("/proc/%d/root/run/credentials/%s/%s", mainPID(t, m, unit), unit, name)
	got, err := m.ReadFile(t.Context(), file)
	if err != nil {
		t.Errorf("what %s has of %s: %v", unit, name, err)
		return
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s has %s of %s, want %s", unit, digest(got), name, digest(want))
	}
}

// digest says of a value what may be shown.
func digest(b []byte) string {
	return fmt.Sprintf("%d bytes (sha256 %.4x…)", len(b), sha256.Sum256(b))
}

// eventually waits until cond is true, which it asks again and again.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), waitLimit)
	defer cancel()
	ticker := time.NewTicker(pollEvery)
	defer ticker.Stop()
	for !cond() {
		select {
		case <-ctx.Done():
			t.Fatalf("waiting until %s: it took too long", what)
		case <-ticker.C:
		}
	}
}

// gatePhase is how far the gate has come: refreshing, watching or restoring, or "" where there is none.
func gatePhase(t testing.TB, m *vm.Machine) string {
	t.Helper()
	var s struct{ Trial *struct{ Phase string } }
	if err := json.Unmarshal(vmtest.ReadFile(t, m, "/run/credstore/.guestagent/state.json"), &s); err != nil {
		t.Fatal(err)
	}
	if s.Trial == nil {
		return ""
	}
	return s.Trial.Phase
}

// waitPhase waits until the gate has come that far.
func waitPhase(t testing.TB, m *vm.Machine, phase string) {
	t.Helper()
	eventually(t, fmt.Sprintf("the gate's phase is %q", phase), func() bool { return gatePhase(t, m) == phase })
}

// killAgent kills the agent with SIGKILL and returns when it has gone. PID 1 starts it anew by itself.
func killAgent(t *testing.T, m *vm.Machine) {
	t.Helper()
	before := show(t, m, agentService, "InvocationID")
	vmtest.Run(t, m, "systemctl", "kill", "--signal=KILL", agentService)
	eventually(t, "the agent is back", func() bool {
		return show(t, m, agentService, "InvocationID") != before && show(t, m, agentService, "ActiveState") == "active"
	})
}

// agentJournal is what the agent has said.
func agentJournal(t testing.TB, m *vm.Machine, since string) string {
	t.Helper()
	return vmtest.Run(t, m, "journalctl", "--no-pager", "--output=cat", "--unit="+agentService, "--after-cursor="+since)
}

// cursor is the journal's end.
func cursor(t testing.TB, m *vm.Machine) string {
	t.Helper()
	out := vmtest.Run(t, m, "journalctl", "--no-pager", "--lines=0", "--show-cursor")
	_, c, ok := strings.Cut(out, "-- cursor: ")
	if !ok {
		t.Fatalf("journalctl shows no cursor: %q", out)
	}
	return strings.TrimSpace(c)
}

// wantSilence checks that no value is in the journal.
func wantSilence(t testing.TB, m *vm.Machine) {
	t.Helper()
	journal, err := m.Journal(t.Context())
	if err != nil || bytes.Contains(journal, []byte(mark)) {
		t.Errorf("journal: %v, or it has values", err)
	}
}
