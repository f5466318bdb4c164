package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/guestagent/guestagent/tests/vm"
)

const (
	// What a provider says of its guest ends so.
	handingOver = "handing over the set"
	inForce     = "the set is in force"
	// notices are how many it may send ahead of us, notice is the size of the longest.
	notices = 64
	notice  = 16 << 10
	// endLimit is how long it may take to end.
	endLimit = 10 * time.Second
)

// A provider is a guestctl that runs on the host for one guest.
type provider struct {
	demo *demo
	cmd  *exec.Cmd
	stop context.CancelFunc
	done <-chan struct{}
	log  bytes.Buffer // what it wrote; it is read after done
	conn *net.UnixConn
	said chan string // what it told the service manager, which we are
}

// provide starts a provider and waits until it listens. The caller ends it.
func (d *demo) provide(ctx context.Context, args ...string) (p *provider, err error) {
	p = &provider{demo: d, said: make(chan string, notices)}
	address := &net.UnixAddr{Name: filepath.Join(d.dir, "notify.sock"), Net: "unixgram"}
	if p.conn, err = net.ListenUnixgram(address.Net, address); err != nil {
		return nil, err
	}
	// Its own files are in our folder.
	args = append([]string{"provide"}, append(args, "--state=state", "--socket=provider.sock")...)
	ctx, p.stop = context.WithCancel(ctx)
	p.cmd = d.guestctl(ctx, args...)
	p.cmd.Cancel = func() error { return p.cmd.Process.Signal(syscall.SIGTERM) }
	p.cmd.WaitDelay = endLimit
	p.cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+address.Name)
	p.cmd.Stdout, p.cmd.Stderr = &p.log, &p.log
	d.say("On the host, in the background: guestctl %s", strings.Join(p.cmd.Args[1:], " "))
	if p.done, err = vm.StartHost(p.cmd); err != nil {
		p.stop()
		return nil, errors.Join(err, p.conn.Close())
	}
	go p.listen()
	if err := p.until(ctx, "READY=1"); err != nil {
		return nil, errors.Join(err, p.end())
	}
	return p, nil
}

// listen takes what the provider says until the socket is closed.
func (p *provider) listen() {
	defer close(p.said)
	b := make([]byte, notice)
	for {
		n, err := p.conn.Read(b)
		if err != nil {
			return
		}
		select {
		case p.said <- string(b[:n]):
		case <-p.done:
		}
	}
}

// until waits until what the provider says ended in each of the texts, one after the other, and shows where it did.
func (p *provider) until(ctx context.Context, ends ...string) error {
	ctx, cancel := context.WithTimeout(ctx, waitLimit)
	defer cancel()
	for _, end := range ends {
		for said := ""; !strings.HasSuffix(said, end); {
			select {
			case said = <-p.said:
			case <-p.done:
				return fmt.Errorf("waiting until the provider says %q: it has ended; it said %q before", end, said)
			case <-ctx.Done():
				return fmt.Errorf("waiting until the provider says %q: %w; it said %q before", end, context.Cause(ctx), said)
			}
			if status, ok := strings.CutPrefix(said, "STATUS="); ok && strings.HasSuffix(said, end) {
				fmt.Fprintln(p.demo.out, status)
			}
		}
	}
	return nil
}

// end ends the provider.
func (p *provider) end() error {
	p.stop()
	<-p.done
	err := p.conn.Close()
	for range p.said { // until it is closed
	}
	if !p.cmd.ProcessState.Success() {
		err = errors.Join(err, fmt.Errorf("ending the provider: %s; it wrote:\n%s", p.cmd.ProcessState, p.log.Bytes()))
	}
	return err
}
