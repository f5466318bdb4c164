package vm

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
)

// fakeQMP answers each line that a client sends, after the greeting, with the next answer, and tells what it was sent.
func fakeQMP(t *testing.T, greeting string, answers ...string) (path string, sent <-chan string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "qmp")
	var lc net.ListenConfig
	l, err := lc.Listen(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan string, len(answers))
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer func() { _ = conn.Close() }()
		_, _ = io.WriteString(conn, greeting)
		r := bufio.NewReader(conn)
		for _, a := range answers {
			line, err := r.ReadString('\n')
			if err != nil {
				return
			}
			got <- strings.TrimSpace(line)
			_, _ = io.WriteString(conn, a)
		}
		_, _ = io.Copy(io.Discard, r)
	}()
	t.Cleanup(func() {
		_ = l.Close()
		<-done
	})
	return path, got
}

const (
	qmpGreeting = `{"QMP": {"version": {}, "capabilities": []}}` + "\r\n"
	qmpDone     = `{"return": {}}` + "\r\n"
)

func TestQMP(t *testing.T) {
	path, sent := fakeQMP(t, qmpGreeting, qmpDone,
		`{"event": "STOP", "timestamp": {}}`+"\r\n"+`{"event": "DEVICE_DELETED", "data": {"device": "x", "path": "/x"}}`+"\r\n"+qmpDone,
		`{"error": {"class": "GenericError", "desc": "no such thing"}}`+"\r\n")
	q, err := dialQMP(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer q.close()
	if err := q.do("device_del", map[string]any{"id": "x"}); err != nil {
		t.Error(err)
	}
	// They came before the answer, and in another order.
	for event, device := range map[string]string{"DEVICE_DELETED": "x", "STOP": ""} {
		if err := q.await(event, device); err != nil {
			t.Error(err)
		}
	}
	if err := q.do("bad", nil); err == nil || !strings.Contains(err.Error(), "bad: GenericError: no such thing") {
		t.Errorf("do = %v, want QEMU's error", err)
	}
	for _, want := range []string{`{"execute":"qmp_capabilities"}`, `{"arguments":{"id":"x"},"execute":"device_del"}`, `{"execute":"bad"}`} {
		if got := <-sent; got != want {
			t.Errorf("sent %s, want %s", got, want)
		}
	}
}

func TestQMPErrors(t *testing.T) {
	path, _ := fakeQMP(t, `{"return": {}}`)
	if q, err := dialQMP(t.Context(), path); err == nil {
		q.close()
		t.Error("dialQMP of what does not greet worked")
	}
	path, _ = fakeQMP(t, qmpGreeting, qmpDone)
	ctx, cancel := context.WithCancelCause(t.Context())
	q, err := dialQMP(ctx, path)
	if err != nil {
		t.Fatal(err)
	}
	defer q.close()
	want := errors.New("enough")
	cancel(want)
	if err := q.await("NEVER", ""); !errors.Is(err, want) {
		t.Errorf("await = %v, want %v", err, want)
	}
}

func TestControlInContainer(t *testing.T) {
	m := &Machine{Accel: accelContainer}
	for name, err := range map[string]error{
		"Pause": m.Pause(t.Context()), "Resume": m.Resume(), "Reset": m.Reset(t.Context()), "RestartVsock": m.RestartVsock(t.Context(), 0),
	} {
		if !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("%s of a container = %v, want %v", name, err, errors.ErrUnsupported)
		}
	}
	if _, err := (&Machine{Accel: accelTCG}).HostPath("/run"); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("HostPath of a virtual machine = %v, want %v", err, errors.ErrUnsupported)
	}
}
