// Command credpeer asks for a credential as PID 1 does, from an address of its caller's choice.
//
//	credpeer ADDRESS SOCKET    binds to the address, "@" for an abstract one, connects, and reads to the end
//
// It prints how many bytes it was given and how many of them are not 0, or the error that kept it from asking. Never a byte
// of what it read. It is for tests only.
package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
)

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "credpeer:", err)
		os.Exit(1)
	}
}

func run(args []string, out io.Writer) error {
	if len(args) != 2 {
		return errors.New("usage: credpeer ADDRESS SOCKET")
	}
	conn, err := net.DialUnix("unix", &net.UnixAddr{Name: args[0], Net: "unix"}, &net.UnixAddr{Name: args[1], Net: "unix"})
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.CloseWrite(); err != nil {
		return err
	}
	b, err := io.ReadAll(conn)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "%d bytes, %d not 0\n", len(b), len(b)-bytes.Count(b, []byte{0}))
	return err
}
