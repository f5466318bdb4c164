package fleet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/guestagent/guestagent/vsockrpc"
)

const (
	// patience bounds every wait.
	patience = 2 * time.Minute
	// rest is longer than a provider's pause between two looks at its guest.
	rest = 500 * time.Millisecond
)

// A host is the providers of this machine, and the guests that they are for.
type host struct {
	t                         testing.TB
	dir                       string
	guestagent, guestctl      string
	providers, agents, pulled []*exec.Cmd
}

// newHost prepares n guests, and starts nothing.
func newHost(t testing.TB, n int) *host {
	t.Helper()
	if runtime.GOOS != "linux" {
		t.Skip("the agent runs on Linux")
	}
	// A guest's /run is a tmpfs, and so should this be.
	dir, err := os.MkdirTemp("/dev/shm", "fleet") //nolint:usetesting // a socket's path is short, too
	if err != nil {
		dir, err = os.MkdirTemp("", "fleet") //nolint:usetesting // a socket's path is short
	}
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	h := &host{
		t: t, dir: dir, guestagent: build(t, "guestagent"), guestctl: build(t, "guestctl"),
		providers: make([]*exec.Cmd, n), agents: make([]*exec.Cmd, n), pulled: make([]*exec.Cmd, n),
	}
	t.Cleanup(func() {
		for _, c := range slices.Concat(h.providers, h.agents, h.pulled) {
			if c != nil && c.Process != nil && c.ProcessState == nil {
				_ = c.Process.Kill()
				_ = c.Wait()
			}
		}
	})
	for i := range n {
		must(t, os.MkdirAll(filepath.Join(rootOf(dir, i), "etc/guestagent"), 0o700))
		config := fmt.Sprintf(`{"provider": {"address": "unix:%s"}}`, h.of(i, "bell"))
		must(t, os.WriteFile(filepath.Join(rootOf(dir, i), "etc/guestagent/config.json"), []byte(config), 0o600))
		must(t, os.Mkdir(h.of(i, "creds"), 0o700))
		h.give(i, "own", 0)
		h.give(i, "other", 0)
	}
	return h
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// of is a path of the provider's of guest i.
func (h *host) of(i int, what string) string {
	return filepath.Join(h.dir, fmt.Sprintf("p%d.%s", i, what))
}

// canary is the value of a guest, and which of them.
var canary = regexp.MustCompile(`canary of (\d+), `)

func value(i, version int) []byte { return fmt.Appendf(nil, "canary of %d, %d", i, version) }

// give puts a value where the provider of guest i finds it.
func (h *host) give(i int, name string, version int) {
	h.t.Helper()
	must(h.t, os.WriteFile(h.of(i, "new"), value(i, version), 0o600))
	must(h.t, os.Rename(h.of(i, "new"), filepath.Join(h.of(i, "creds"), name)))
}

// all does something for each guest, some at a time.
func (h *host) all(what string, do func(i int) error) {
	h.t.Helper()
	errs := make([]error, len(h.providers))
	each(starters, len(errs), func(i int) { errs[i] = do(i) })
	for i, err := range errs {
		if err != nil {
			log, _ := os.ReadFile(h.of(i, "log"))
			h.t.Fatalf("guest %d: %s: %v\n%s", i, what, err, log)
		}
	}
}

// await waits for all guests at the same time.
func (h *host) await(what string, cond func(i int) bool) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), patience)
	defer cancel()
	errs := make([]error, len(h.providers))
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() {
			tick := time.NewTicker(20 * time.Millisecond)
			defer tick.Stop()
			for !cond(i) {
				select {
				case <-tick.C:
				case <-ctx.Done():
					errs[i] = ctx.Err()
					return
				}
			}
		})
	}
	wg.Wait()
	h.all(what, func(i int) error { return errs[i] })
}

// provide starts the providers, and waits until each can be rung.
func (h *host) provide() {
	h.t.Helper()
	h.all("starting its provider", func(i int) error {
		log, err := os.OpenFile(h.of(i, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		defer log.Close()
		cmd := exec.Command(h.guestctl, "provide", "--listen", "unix:"+h.of(i, "bell"), "--target", "unix:"+socket(rootOf(h.dir, i)),
			"--dir", h.of(i, "creds"), "--state", h.of(i, "state"), "--socket", h.of(i, "sock"))
		cmd.Stdout, cmd.Stderr = log, log
		h.providers[i] = cmd
		return cmd.Start()
	})
	h.await("its provider listens", func(i int) bool {
		c, err := net.Dial("unix", h.of(i, "bell"))
		if err == nil {
			_ = c.Close()
		}
		return err == nil
	})
}

// end ends providers as systemd does.
func (h *host) end() {
	h.t.Helper()
	h.all("ending its provider", func(i int) error {
		if err := h.providers[i].Process.Signal(syscall.SIGTERM); err != nil {
			return err
		}
		return h.providers[i].Wait()
	})
}

// boot boots all guests: the agent listens, and asks for the first set. It
// returns when all have theirs.
func (h *host) boot() {
	h.t.Helper()
	h.all("booting", func(i int) (err error) {
		root := rootOf(h.dir, i)
		if h.agents[i], err = start(h.guestagent, root); err != nil {
			return err
		}
		log, err := os.OpenFile(h.of(i, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		defer log.Close()
		h.pulled[i] = exec.Command(h.guestagent, "pull", "--root", root)
		h.pulled[i].Stderr = log
		return h.pulled[i].Start()
	})
	for i, c := range h.pulled {
		if err := c.Wait(); err != nil {
			log, _ := os.ReadFile(h.of(i, "log"))
			h.t.Fatalf("guest %d: its pull: %v\n%s", i, err, log)
		}
	}
}

// halt ends all guests, who forget what they had in memory.
func (h *host) halt() {
	h.t.Helper()
	h.all("halting", func(i int) error {
		if err := h.agents[i].Process.Kill(); err != nil {
			return err
		}
		_ = h.agents[i].Wait()
		return errors.Join(os.RemoveAll(filepath.Join(rootOf(h.dir, i), "run")), os.Remove(socket(rootOf(h.dir, i))))
	})
}

// installed is a credential's file in guest i.
func (h *host) installed(i int, name string) string {
	return filepath.Join(rootOf(h.dir, i), "run/credstore", name)
}

// check checks that each guest has its own values and nobody else's, and that
// no provider tells or keeps one.
func (h *host) check(versions map[string]int) {
	h.t.Helper()
	h.all("looking at what it has", func(i int) error {
		for name, version := range versions {
			if got, err := os.ReadFile(h.installed(i, name)); err != nil || !bytes.Equal(got, value(i, version)) {
				return fmt.Errorf("%s has %q, %w, want %q", name, got, err, value(i, version))
			}
		}
		none := func(path string, allowed string) error {
			return filepath.WalkDir(path, func(path string, e fs.DirEntry, err error) error {
				if err != nil || !e.Type().IsRegular() {
					return err
				}
				b, err := os.ReadFile(path)
				for _, m := range canary.FindAllSubmatch(b, -1) {
					if string(m[1]) != allowed {
						return fmt.Errorf("%s has a value of guest %s", path, m[1])
					}
				}
				return err
			})
		}
		return errors.Join(none(rootOf(h.dir, i), strconv.Itoa(i)), none(h.of(i, "state"), ""), none(h.of(i, "log"), ""))
	})
}

func (h *host) status(i int) *vsockrpc.ProviderStatus {
	c, err := vsockrpc.Dial(h.t.Context(), vsockrpc.Target{Scheme: vsockrpc.SchemeUnix, Path: h.of(i, "sock")})
	if err != nil {
		return &vsockrpc.ProviderStatus{}
	}
	defer c.Close()
	s, err := vsockrpc.Provider{Client: c}.Status(h.t.Context())
	if err != nil {
		return &vsockrpc.ProviderStatus{}
	}
	return s
}

// inForce is what the values of a guest are called, nil if not all is in force.
func (h *host) inForce(i int) map[string]string {
	s := h.status(i)
	if s.State != vsockrpc.GuestInForce || s.Report == nil {
		return nil
	}
	labels := map[string]string{}
	for _, e := range s.Report.Entries {
		labels[e.Name] = e.Revision
	}
	return labels
}

// Guests that boot in the same moment each get their own set, and then what
// changes of it. A provider that lost its labels gives others, and the guest
// nothing new.
func TestProviders(t *testing.T) {
	n := 100
	if testing.Short() {
		n = 5
	}
	h := newHost(t, n)
	h.provide()
	h.boot()
	h.check(map[string]int{"own": 0, "other": 0})

	for i := range n {
		h.give(i, "own", 1)
	}
	h.await("its new value", func(i int) bool {
		got, err := os.ReadFile(h.installed(i, "own"))
		return err == nil && bytes.Equal(got, value(i, 1))
	})
	h.check(map[string]int{"own": 1, "other": 0})
	h.await("its set in force", func(i int) bool { return h.inForce(i) != nil })

	labels, files := make([]map[string]string, n), make([]fs.FileInfo, n)
	h.all("its labels", func(i int) (err error) {
		labels[i] = h.inForce(i)
		files[i], err = os.Stat(h.installed(i, "own"))
		return err
	})
	h.end()
	h.all("losing its labels", func(i int) error { return os.RemoveAll(h.of(i, "state")) })
	h.provide()
	h.await("its new labels", func(i int) bool {
		now := h.inForce(i)
		return now["own"] != "" && now["own"] != labels[i]["own"] && now["other"] != "" && now["other"] != labels[i]["other"]
	})
	h.all("looking at its files", func(i int) error {
		now, err := os.Stat(h.installed(i, "own"))
		if err == nil && (!os.SameFile(now, files[i]) || !now.ModTime().Equal(files[i].ModTime())) {
			err = errors.New("the value was installed anew")
		}
		return err
	})
	h.check(map[string]int{"own": 1, "other": 0})

	h.halt()
	h.boot()
	h.check(map[string]int{"own": 1, "other": 0})
	h.end()
}

// BenchmarkProviders is guests that boot in the same moment, on one machine with
// the providers that wait for them: from the start of the first agent until each
// guest has its set. What is in memory at the end is of an agent and of a
// provider, all of it and what no other process shares.
func BenchmarkProviders(b *testing.B) {
	for _, n := range []int{1, 10, 100} {
		b.Run(fmt.Sprintf("guests=%d", n), func(b *testing.B) {
			h := newHost(b, n)
			begun := time.Now()
			h.provide()
			up := time.Since(begun)
			for again := false; b.Loop(); again = true {
				b.StopTimer()
				if again {
					h.halt()
				}
				h.await("its provider waits", func(i int) bool { return h.status(i).State == vsockrpc.GuestWaiting })
				<-time.After(rest) // who boots seldom finds it at work
				b.StartTimer()
				h.boot()
			}
			h.check(map[string]int{"own": 0, "other": 0})
			h.await("its set in force", func(i int) bool { return h.inForce(i) != nil })
			mean := func(list []*exec.Cmd, what string) float64 {
				var sum int64
				for _, c := range list {
					sum += resident(b, c.Process.Pid, what)
				}
				return float64(sum) / float64(n) / (1 << 20)
			}
			b.ReportMetric(up.Seconds()*1000, "providers-up-ms")
			b.ReportMetric(mean(h.agents, "VmRSS"), "agent-MiB")
			b.ReportMetric(mean(h.agents, "RssAnon"), "agent-own-MiB")
			b.ReportMetric(mean(h.providers, "VmRSS"), "provider-MiB")
			b.ReportMetric(mean(h.providers, "RssAnon"), "provider-own-MiB")
			h.end()
		})
	}
}
