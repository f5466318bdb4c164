package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

var errUsage = errors.New("usage: vsockpeer cid | bind PORT | dial CID PORT | call CID PORT MESSAGE | serve PORT")

// errorName returns the name of the kernel's error in err, or "".
func errorName(err error) string {
	if errno, ok := errors.AsType[unix.Errno](err); ok {
		return unix.ErrnoName(errno)
	}
	return ""
}

func run(args []string, out io.Writer) error {
	want := map[string]int{"cid": 1, "bind": 2, "dial": 3, "call": 4, "serve": 2}
	if len(args) == 0 || want[args[0]] != len(args) {
		return errUsage
	}
	var numbers []uint32
	for _, s := range args[1:min(len(args), 3)] {
		n, err := strconv.ParseUint(s, 10, 32)
		if err != nil {
			return errUsage
		}
		numbers = append(numbers, uint32(n))
	}
	numbers = slices.Grow(numbers, 2)[:2]
	switch args[0] {
	case "cid":
		return cid(out)
	case "bind":
		l, err := bind(numbers[0])
		if err != nil {
			return err
		}
		return l.Close()
	case "dial":
		return dial(numbers[0], numbers[1], "hello from the guest\n", '\n', out)
	case "call":
		return dial(numbers[0], numbers[1], args[3]+"\x00", 0, out)
	}
	return serve(numbers[0])
}

func cid(out io.Writer) error {
	f, err := os.Open("/dev/vsock")
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	n, err := unix.IoctlGetInt(int(f.Fd()), unix.IOCTL_VM_SOCKETS_GET_LOCAL_CID)
	if err != nil {
		return fmt.Errorf("asking for the CID: %w", err)
	}
	_, err = fmt.Fprintln(out, uint32(n)) //nolint:gosec // the kernel writes 32 bits
	return err
}

// socket makes a socket that blocks.
func socket() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("making a socket: %w", err)
	}
	return os.NewFile(uintptr(fd), "vsock"), nil
}

func bind(port uint32) (*os.File, error) {
	l, err := socket()
	if err != nil {
		return nil, err
	}
	if err := unix.Bind(int(l.Fd()), &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: port}); err != nil {
		_ = l.Close()
		return nil, fmt.Errorf("binding port %d: %w", port, err)
	}
	return l, nil
}

// connect connects a socket. A signal, such as those by which Go preempts, has Linux give up connecting.
func connect(peer, port uint32) (*os.File, error) {
	for {
		conn, err := socket()
		if err != nil {
			return nil, err
		}
		err = unix.Connect(int(conn.Fd()), &unix.SockaddrVM{CID: peer, Port: port})
		if err == nil {
			return conn, nil
		}
		_ = conn.Close()
		if !errors.Is(err, unix.EINTR) {
			return nil, err
		}
	}
}

// dial says something, and prints what comes back up to end.
func dial(peer, port uint32, say string, end byte, out io.Writer) error {
	conn, err := connect(peer, port)
	if err != nil {
		return fmt.Errorf("connecting to %d:%d: %w", peer, port, err)
	}
	defer func() { _ = conn.Close() }()
	if _, err := io.WriteString(conn, say); err != nil {
		return err
	}
	line, err := bufio.NewReader(conn).ReadString(end)
	if err != nil {
		return fmt.Errorf("reading an answer: %w", err)
	}
	_, err = io.WriteString(out, line)
	return err
}

func serve(port uint32) error {
	l, err := bind(port)
	if err != nil {
		return err
	}
	if err := unix.Listen(int(l.Fd()), unix.SOMAXCONN); err != nil {
		return fmt.Errorf("listening: %w", err)
	}
	if err := ready(os.Getenv("NOTIFY_SOCKET")); err != nil {
		return fmt.Errorf("telling systemd: %w", err)
	}
	for {
		fd, from, err := unix.Accept4(int(l.Fd()), unix.SOCK_CLOEXEC)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ECONNABORTED) {
			continue
		}
		if err != nil {
			return fmt.Errorf("accepting: %w", err)
		}
		go echo(os.NewFile(uintptr(fd), "vsock"), from)
	}
}

func echo(conn *os.File, from unix.Sockaddr) {
	defer func() { _ = conn.Close() }()
	peer, ok := from.(*unix.SockaddrVM)
	if !ok {
		return
	}
	if _, err := fmt.Fprintf(conn, "%d %d\n", peer.CID, peer.Port); err != nil {
		return
	}
	// Plain reads and writes: splice(2) is not what is tested here.
	_, _ = io.Copy(struct{ io.Writer }{conn}, struct{ io.Reader }{conn})
}

// ready tells systemd that the port is listened on.
func ready(path string) error {
	if path == "" {
		return nil
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	_, err = io.WriteString(conn, "READY=1")
	return err
}
