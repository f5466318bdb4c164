package main

import (
	"bytes"
	"context"
	"io"
	"os"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

// openTerminal returns both ends of a terminal of 80 times 24 characters.
func openTerminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("there are no terminals: %v; mount devpts, and link /dev/ptmx to pts/ptmx", err)
	}
	t.Cleanup(func() { _ = master.Close() })
	fd := int(master.Fd())
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if slave, err = os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = slave.Close() })
	if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 80}); err != nil {
		t.Fatal(err)
	}
	return master, slave
}

// Of several guests a terminal shows a table, and is given back.
func TestWatchOnTerminal(t *testing.T) {
	t.Setenv("TERM", "xterm")
	dir := t.TempDir()
	for _, name := range []string{"a", "b"} {
		if err := register(dir, name, "unix:"+dir+"/"+name+".sock"); err != nil {
			t.Fatal(err)
		}
	}
	master, slave := openTerminal(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	p := &program{stdout: slave, stderr: io.Discard, terminal: true}
	root := p.root()
	root.SetArgs([]string{"watch", "--all", "--vms", dir + "/vms"})
	done := make(chan error, 1)
	go func() { done <- root.ExecuteContext(ctx) }()
	var shown []byte
	b := make([]byte, 4096)
	until := func(want string) {
		t.Helper()
		for !bytes.Contains(shown, []byte(want)) {
			n, err := master.Read(b)
			if err != nil {
				t.Fatalf("shown %q, then %v, want %q", shown, err, want)
			}
			shown = append(shown, b[:n]...)
		}
	}
	until(enterScreen)
	until("2 guests, 2 unreachable")
	cancel()
	until(leaveScreen)
	if err := <-done; err != nil {
		t.Errorf("watch = %v", err)
	}
}

func TestNoScreen(t *testing.T) {
	_, slave := openTerminal(t)
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	for _, c := range []struct {
		name, term string
		stdout     io.Writer
		want       bool
	}{
		{"a terminal", "xterm", slave, true},
		{"a dumb one", "dumb", slave, false},
		{"one that nobody knows", "", slave, false},
		{"another device", "xterm", null, false},
		{"no file", "xterm", io.Discard, false},
	} {
		t.Setenv("TERM", c.term)
		if got := (&program{stdout: c.stdout, terminal: true}).screen() != nil; got != c.want {
			t.Errorf("%s: a screen = %v, want %v", c.name, got, c.want)
		}
	}
}
