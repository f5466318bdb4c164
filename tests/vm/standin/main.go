// Command standin is the VMM of a guest that is no VM: its vsock is a Unix socket, as cloud-hypervisor and Firecracker
// have it.
//
//	standin vmm SOCKET AGENT GUEST    is rung up at SOCKET: "CONNECT 1022" leads to the Unix socket AGENT, any other port
//	                                  to nobody. Who connects to GUEST, as root in the guest does, is led to SOCKET_1021.
//	standin relay SOCKET WAY GUEST LEASH
//	                                  is the VMM of a VM that somebody else runs, who is connected to at LEASH: the VM is to
//	                                  run as long as that connection lasts. It is rung up at SOCKET, which leads to WAY as it
//	                                  is. The VM rings at GUEST_1021, and what it says at GUEST_8888 is said to systemd.
//	standin call SOCKET MESSAGE       connects, writes the message and a NUL, and prints what comes back up to a NUL
//
// Where the kernel says no to a call, it prints the name of the error, such as EACCES, and ends with status 1. It is for
// tests only: it serves whoever comes.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
)

var errUsage = errors.New("usage: standin vmm SOCKET AGENT GUEST | standin relay SOCKET WAY GUEST LEASH | standin call SOCKET MESSAGE")

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stdout, errorName(err))
		fmt.Fprintln(os.Stderr, "standin:", err)
		os.Exit(1)
	}
}

// errorName returns the name of the kernel's error in err, or "".
func errorName(err error) string {
	for errno, name := range map[syscall.Errno]string{
		syscall.EACCES: "EACCES", syscall.ECONNREFUSED: "ECONNREFUSED", syscall.ENOENT: "ENOENT", syscall.EPERM: "EPERM",
	} {
		if errors.Is(err, errno) {
			return name
		}
	}
	return ""
}

func run(args []string, out io.Writer) error {
	switch {
	case len(args) == 4 && args[0] == "vmm":
		return vmm(args[1], args[2], args[3])
	case len(args) == 5 && args[0] == "relay":
		return relay(args[1], args[2], args[3], args[4])
	case len(args) == 3 && args[0] == "call":
		return call(args[1], args[2], out)
	}
	return errUsage
}

func call(socket, message string, out io.Writer) error {
	conn, err := dial(socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, message+"\x00"); err != nil {
		return err
	}
	answer, err := bufio.NewReader(conn).ReadString(0)
	if err != nil {
		return fmt.Errorf("reading an answer: %w", err)
	}
	_, err = io.WriteString(out, answer)
	return err
}

func dial(socket string) (net.Conn, error) {
	return new(net.Dialer).DialContext(context.Background(), "unix", socket)
}

// listen fails where the socket is there already, as cloud-hypervisor does.
func listen(socket string) (net.Listener, error) {
	l, err := new(net.ListenConfig).Listen(context.Background(), "unix", socket)
	if err != nil {
		return nil, err
	}
	// A runner is killed, and the socket stays.
	if l, ok := l.(*net.UnixListener); ok {
		l.SetUnlinkOnClose(false)
	}
	return l, nil
}

func vmm(socket, agent, guest string) error {
	host, err := listen(socket)
	if err != nil {
		return err
	}
	device, err := listen(guest)
	if err != nil {
		return err
	}
	// The guest's root may open its device, whoever the VMM runs as.
	if err := os.Chmod(guest, 0o666); err != nil {
		return err
	}
	if err := tell("READY=1"); err != nil {
		return err
	}
	ended := make(chan error, 2)
	go func() {
		ended <- serve(device, func(c net.Conn) {
			join(c, socket+"_1021")
		})
	}()
	go func() {
		ended <- serve(host, func(c net.Conn) {
			if connect(c) == nil {
				join(c, agent)
			}
		})
	}()
	return <-ended
}

func relay(socket, way, guest, leash string) error {
	host, err := listen(socket)
	if err != nil {
		return err
	}
	bell, err := listen(guest + "_1021")
	if err != nil {
		return err
	}
	notify, err := listen(guest + "_8888")
	if err != nil {
		return err
	}
	vm, err := dial(leash)
	if err != nil {
		return err
	}
	ended := make(chan error, 4)
	go func() {
		_, err := io.Copy(io.Discard, vm)
		ended <- errors.Join(errors.New("the VM has ended"), err)
	}()
	go func() { ended <- serve(host, func(c net.Conn) { join(c, way) }) }()
	go func() { ended <- serve(bell, func(c net.Conn) { join(c, socket+"_1021") }) }()
	go func() { ended <- serve(notify, hear) }()
	return <-ended
}

// hear takes what a guest's PID 1 says, one message per connection, whose end it waits for.
func hear(c net.Conn) {
	b := make([]byte, 4096)
	n, err := c.Read(b)
	if err == nil {
		err = tell(string(b[:n]))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "standin:", err)
	}
}

func serve(l net.Listener, handle func(net.Conn)) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			handle(c)
		}()
	}
}

// connect does the handshake. It reads no byte more than that.
func connect(c net.Conn) error {
	const want = "CONNECT 1022\n"
	line := make([]byte, len(want))
	if _, err := io.ReadFull(c, line); err != nil {
		return err
	}
	if string(line) != want {
		return errors.New("nobody listens on that port")
	}
	_, err := io.WriteString(c, "OK 1073741824\n")
	return err
}

// join leads c to the socket, until either end hangs up.
func join(c net.Conn, socket string) {
	to, err := dial(socket)
	if err != nil {
		fmt.Fprintln(os.Stderr, "standin:", err)
		return
	}
	done := make(chan struct{}, 2)
	for _, pair := range [][2]net.Conn{{c, to}, {to, c}} {
		go func() {
			_, _ = io.Copy(pair[0], pair[1])
			done <- struct{}{}
		}()
	}
	<-done
	_ = c.Close()
	_ = to.Close()
	<-done
}

// tell says something to systemd.
func tell(message string) error {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("telling systemd: %w", err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, message); err != nil {
		return fmt.Errorf("telling systemd: %w", err)
	}
	return nil
}
