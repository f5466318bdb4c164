package vm_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/guestagent/guestagent/tests/vm"
	"github.com/guestagent/guestagent/tests/vm/vmtest"
	"github.com/guestagent/guestagent/vsockrpc"
)

// maxResident is how much of the agent may be in memory, in bytes.
const maxResident = 10 << 20

// A sight is what guestctl says of how a guest is.
type sight struct {
	Verdict string                    `json:"verdict"`
	Reasons []vsockrpc.Reason         `json:"reasons"`
	Error   *struct{ Message string } `json:"error"`
}

func decodeSight(line string) (s sight, err error) {
	err = json.Unmarshal([]byte(line), &s)
	return s, err
}

// has reports whether one of the reasons has that code, and is about that unit and credential.
func (s sight) has(want vsockrpc.Reason) bool {
	return slices.ContainsFunc(s.Reasons, func(r vsockrpc.Reason) bool {
		return r.Code == want.Code && r.Unit == want.Unit && r.Credential == want.Credential
	})
}

// A watched is a guest that `guestctl watch` runs for, on the host.
type watched struct {
	m           *vm.Machine
	ctl, target string

	watch *vmtest.Host

	// remarks are the reasons of a guest that is well, by code.
	remarks []string
}

// watchGuest begins to watch; the guest need not be there yet.
func watchGuest(t testing.TB, target string) *watched {
	t.Helper()
	w := &watched{ctl: vmtest.Guestctl(t), target: target}
	w.watch = vmtest.StartHost(t, vmtest.HostConfig{Program: w.ctl, Args: []string{"watch", "--json", target}})
	return w
}

// await waits for a line of the watch since its mark.
func (w *watched) await(t testing.TB, what string, ok func(sight) bool) (sight, time.Time) {
	t.Helper()
	var got sight
	line := w.watch.AwaitLine(t, what, func(line string) bool {
		s, err := decodeSight(line)
		if err != nil {
			t.Errorf("guestctl watch says %q: %v", line, err)
		}
		got = s
		return err == nil && ok(s)
	})
	return got, line.At
}

// status is what `guestctl status` says now, and its exit status.
func (w *watched) status(t testing.TB) (sight, int) {
	t.Helper()
	out, status, stderr := w.run(t, nil, "status", "--json", "--timeout=1m", w.target)
	s, err := decodeSight(out)
	if err != nil {
		t.Fatalf("guestctl status says %q: %v\n%s", out, err, stderr)
	}
	return s, status
}

// run runs guestctl on the host.
func (w *watched) run(t testing.TB, stdin []byte, args ...string) (stdout string, status int, stderr string) {
	t.Helper()
	var out, said strings.Builder
	cmd := exec.CommandContext(t.Context(), w.ctl, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(string(stdin)), &out, &said
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return out.String(), exit.ExitCode(), said.String()
	}
	if err != nil {
		t.Fatal(err)
	}
	return out.String(), 0, said.String()
}

// mustRun is run where anything but success is a fault.
func (w *watched) mustRun(t testing.TB, stdin []byte, args ...string) {
	t.Helper()
	if out, status, stderr := w.run(t, stdin, args...); status != 0 {
		t.Fatalf("guestctl %q: status %d\n%s%s", args, status, out, stderr)
	}
}

// push puts one credential in force and refreshes nobody.
func (w *watched) push(t testing.TB, name string, value []byte) {
	t.Helper()
	w.mustRun(t, value, "push", "--timeout=1m", w.target, name+":-")
}

// turn does something to the guest and waits until the watch tells of what comes of it. It logs how long that took: from the
// end of what was done, and from its beginning.
func (w *watched) turn(t testing.TB, what string, act func(), ok func(sight) bool) sight {
	t.Helper()
	w.watch.Mark()
	begin := time.Now()
	act()
	end := time.Now()
	s, at := w.await(t, what, ok)
	t.Logf("%s: told %.2f s after it was done, which took %.2f s; %s", what, at.Sub(end).Seconds(), end.Sub(begin).Seconds(), s)
	return s
}

// String is for the log.
func (s sight) String() string {
	list := []string{s.Verdict}
	for _, r := range s.Reasons {
		list = append(list, strings.TrimSpace(fmt.Sprintf("%s %s %s (%s: %s; %s)", r.Code, r.Unit, r.Credential, r.Verdict, r.Detail, r.Hint)))
	}
	return strings.Join(list, ", ")
}

// An illness is something that may be wrong with a guest.
type illness struct {
	name string
	// reason is its code, and the unit and the credential that it is about.
	reason vsockrpc.Reason
	// verdicts are those that it may make of a guest.
	verdicts []string
	// prepare is done while nobody looks. It may be nil, and leaves a healthy guest.
	prepare, begin, heal func(t *testing.T)
}

// test has the guest fall ill and get well.
func (w *watched) test(t *testing.T, ill illness) {
	if ill.prepare != nil {
		ill.prepare(t)
		w.untilWell(t)
	}
	bad := func(s sight) bool { return slices.Contains(ill.verdicts, s.Verdict) && s.has(ill.reason) }
	s := w.turn(t, ill.name, func() { ill.begin(t) }, bad)
	for _, r := range s.Reasons {
		if r.Verdict != vsockrpc.VerdictHealthy && (r.Detail == "" || r.Hint == "") {
			t.Errorf("the reason %+v says too little", r)
		}
	}
	if s, status := w.status(t); !bad(s) || status != 3 {
		t.Errorf("guestctl status: %s, exit status %d, want %v with %s, 3", s, status, ill.verdicts, ill.reason.Code)
	}
	w.turn(t, ill.name+" no more", func() { ill.heal(t) }, w.well)
	if s, status := w.status(t); !w.well(s) || status != 0 {
		t.Errorf("guestctl status: %s, exit status %d, want it healthy", s, status)
	}
}

// well reports whether nothing is wrong, and no more is remarked than always is.
func (w *watched) well(s sight) bool {
	return s.Verdict == vsockrpc.VerdictHealthy && slices.EqualFunc(s.Reasons, w.remarks, func(r vsockrpc.Reason, code string) bool { return r.Code == code })
}

func (w *watched) untilWell(t *testing.T) {
	t.Helper()
	eventually(t, "the guest is healthy", func() bool {
		s, _ := w.status(t)
		if !w.well(s) {
			t.Logf("not yet: %s", s)
		}
		return w.well(s)
	})
}

// TestHealth has units come and go faster than anybody looks, while the host watches.
func TestHealth(t *testing.T) {
	allContainers(t, func(t *testing.T, m *vm.Machine, _ vm.Release) {
		socket, err := m.HostPath("/run/guestagent/varlink.sock")
		if err != nil {
			t.Fatal(err)
		}
		w := watchGuest(t, "unix:"+socket)
		// It has no SMBIOS, and no vsock, which is no illness.
		w.m, w.remarks = m, []string{"noSmbios"}
		w.await(t, "it is healthy", w.well)
		addUnits(t, m, healthUnits())
		if !t.Run("given at once", func(t *testing.T) {
			w.push(t, "late", newValue())
			w.untilWell(t)
			w.watch.Mark()
			var units []string
			for i := range 40 {
				units = append(units, fmt.Sprintf("late@%d.service", i))
			}
			for range 3 {
				vmtest.Run(t, m, append([]string{"systemctl", "restart"}, units...)...)
			}
			vmtest.Exec(t, m, vm.Command{Argv: []string{"systemctl", "start", "ill.service"}})
			w.await(t, "a unit has failed", func(s sight) bool {
				failed := s.has(vsockrpc.Reason{Code: "unitFailed", Unit: "ill.service"})
				if !failed && !w.well(s) {
					t.Errorf("while a unit is given what is there, the watch says %s", s)
				}
				return failed
			})
			vmtest.Run(t, m, "systemctl", "stop", "late@*.service")
			vmtest.Run(t, m, "systemctl", "reset-failed", "ill.service")
			w.mustRun(t, nil, "rm", w.target, "late")
			w.untilWell(t)
		}) {
			return
		}
		for range 5 {
			if !t.Run("stopped while it waits", func(t *testing.T) {
				w.test(t, illness{
					name: "waiting consumer", reason: vsockrpc.Reason{Code: "consumerWaiting", Unit: "late.service", Credential: "late"},
					verdicts: []string{vsockrpc.VerdictDegraded},
					begin:    func(t *testing.T) { begin(t, m, "late.service") },
					// systemd 262 takes it for one that failed.
					heal: func(t *testing.T) {
						vmtest.Run(t, m, "sh", "-c", "systemctl stop late.service; systemctl reset-failed late.service || true")
					},
				})
			}) {
				return
			}
		}
		wantSmall(t, m)
	})
}

// wantSmall checks how much of the agent is in memory, once it has given back what it needed for a moment.
func wantSmall(t *testing.T, m *vm.Machine) {
	t.Helper()
	defer logResident(t, m)
	eventually(t, fmt.Sprintf("at most %d bytes of the agent are resident", maxResident), func() bool { return resident(t, m)["VmRSS:"] <= maxResident })
}

// resident says how much of the agent is in memory, in bytes, by /proc/PID/status.
func resident(t testing.TB, m *vm.Machine) map[string]int64 {
	t.Helper()
	pid := strings.TrimSpace(vmtest.Run(t, m, "systemctl", "show", "--value", "--property=MainPID", agentService))
	sizes := map[string]int64{}
	for line := range strings.Lines(string(vmtest.ReadFile(t, m, "/proc/"+pid+"/status"))) {
		if f := strings.Fields(line); len(f) == 3 && f[2] == "kB" {
			n, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			sizes[f[0]] = n << 10
		}
	}
	if sizes["VmRSS:"] == 0 || sizes["VmHWM:"] == 0 {
		t.Fatal("the kernel does not tell how much of the agent is resident")
	}
	return sizes
}

// logResident logs how much of the agent is in memory.
func logResident(t testing.TB, m *vm.Machine) {
	t.Helper()
	sizes := resident(t, m)
	mib := func(key string) float64 { return float64(sizes[key]) / (1 << 20) }
	t.Logf("%.2f MiB of the agent are resident, %.2f of them its own; at most %.2f", mib("VmRSS:"), mib("RssAnon:"), mib("VmHWM:"))
}
