package vmtest_test

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/guestagent/guestagent/tests/vm/vmtest"
)

// helperEnv makes TestHostHelper the program that the other tests start.
const helperEnv = "GUESTAGENT_TEST_HELPER"

func TestHostHelper(t *testing.T) {
	if os.Getenv(helperEnv) == "" {
		return
	}
	conn, err := net.Dial("unixgram", os.Getenv("NOTIFY_SOCKET")) //nolint:gosec // from this file's tests
	if err != nil {
		t.Fatal(err)
	}
	for sc := bufio.NewScanner(os.Stdin); sc.Scan(); {
		if _, err := conn.Write([]byte(strings.ReplaceAll(sc.Text(), ";", "\n"))); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintln(os.Stderr, "said", sc.Text())
		fmt.Fprintln(os.Stdout, "line", sc.Text())
	}
	if os.Getenv(helperEnv) == "stay" {
		select {} // until a signal ends it
	}
	os.Exit(3)
}

func helper(mode string, lines ...string) vmtest.HostConfig {
	return vmtest.HostConfig{
		Program: os.Args[0], Args: []string{"-test.run=^TestHostHelper$"}, Env: []string{helperEnv + "=" + mode},
		Stdin: []byte(strings.Join(append(lines, ""), "\n")),
	}
}

func TestHost(t *testing.T) {
	t.Setenv(vmtest.ArtifactsEnv, t.TempDir())
	h := vmtest.StartHost(t, helper("stay", "STATUS=1 of 2", "READY=1;STATUS=2 of 2"))
	if got := h.AwaitNotify(t, `^STATUS=(\d) of 2$`); got[1] != "1" {
		t.Errorf("AwaitNotify = %q, want the first status", got)
	}
	h.AwaitNotify(t, "^READY=1$")
	h.AwaitStderr(t, "said READY=1;STATUS=2")
	line := h.AwaitLine(t, "the second line", func(line string) bool { return strings.HasPrefix(line, "line READY=1") })
	if line.Text != "line READY=1;STATUS=2 of 2" || line.At.IsZero() {
		t.Errorf("AwaitLine = %+v, want the second line", line)
	}
	h.Mark()
	h.Signal(t, syscall.SIGTERM)
	if got := h.Wait(t); got != 128+int(syscall.SIGTERM) {
		t.Errorf("Wait = %d, want %d", got, 128+int(syscall.SIGTERM))
	}
	b, err := os.ReadFile(h.Notify)
	if want := "STATUS=1 of 2\nREADY=1\nSTATUS=2 of 2\n"; err != nil || string(b) != want {
		t.Errorf("%s = %q, %v, want %q", h.Notify, b, err, want)
	}
}

// TestHostEnds looks for what a program said just before it ended.
func TestHostEnds(t *testing.T) {
	t.Setenv(vmtest.ArtifactsEnv, t.TempDir())
	h := vmtest.StartHost(t, helper("end", "READY=1"))
	if got := h.Wait(t); got != 3 {
		t.Errorf("Wait = %d, want 3", got)
	}
	h.AwaitNotify(t, "READY=1")
	r := record(t, func(tb testing.TB) { h.AwaitNotify(tb, "READY=2") })
	if !strings.Contains(r.failed, "it has ended") || !strings.Contains(r.failed, "said READY=1") {
		t.Errorf("AwaitNotify of what does not come says %q", r.failed)
	}
	// The whole line is there, and not only its beginning.
	h.AwaitLine(t, "the line", func(line string) bool { return line == "line READY=1" })
	h.Mark()
	r = record(t, func(tb testing.TB) { h.AwaitLine(tb, "the line", func(string) bool { return true }) })
	if !strings.Contains(r.failed, "the line in the standard output") || !strings.Contains(r.failed, "it has ended") {
		t.Errorf("AwaitLine of what does not come again says %q", r.failed)
	}
	if other := vmtest.StartHost(t, helper("end")); other.Stderr == h.Stderr {
		t.Errorf("two programs have the file %s", h.Stderr)
	}
}

// TestHostEndsWithTest starts one that nobody stops.
func TestHostEndsWithTest(t *testing.T) {
	t.Setenv(vmtest.ArtifactsEnv, t.TempDir())
	var h *vmtest.Host
	t.Run("test", func(t *testing.T) {
		h = vmtest.StartHost(t, helper("stay"))
	})
	select {
	case <-h.Done():
	default:
		t.Error("it runs after the end of the test")
	}
}
