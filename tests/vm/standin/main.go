// Command standin is the VMM of a guest that is no VM: its vsock is a Unix socket, as cloud-hypervisor and Firecracker
// have it.
//
//	standin vmm SOCKET AGENT GUEST    is rung up at SOCKET: "CONNECT 1022" leads to the Unix socket AGENT, any other port
//	                                  to nobody. Who connects to GUEST, as root in the guest does, is led to SOCKET_1021.
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

var errUsage = errors.New("usage: standin vmm SOCKET AGENT GUEST | standin call SOCKET MESSAGE")

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

// vmm fails where the socket is there already, as cloud-hypervisor does.
func vmm(socket, agent, guest string) error {
	host, err := new(net.ListenConfig).Listen(context.Background(), "unix", socket)
	if err != nil {
		return err
	}
	// A runner is killed, and the socket stays.
	if l, ok := host.(*net.UnixListener); ok {
		l.SetUnlinkOnClose(false)
	}
	device, err := new(net.ListenConfig).Listen(context.Background(), "unix", guest)
	if err != nil {
		return err
	}
	// The guest's root may open its device, whoever the VMM runs as.
	if err := os.Chmod(guest, 0o666); err != nil {
		return err
	}
	if err := ready(os.Getenv("NOTIFY_SOCKET")); err != nil {
		return fmt.Errorf("telling systemd: %w", err)
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

// ready tells systemd that both sockets are listened on.
func ready(path string) error {
	if path == "" {
		return nil
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = io.WriteString(conn, "READY=1")
	return err
}
