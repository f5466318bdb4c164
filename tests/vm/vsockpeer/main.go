//go:build linux

// Command vsockpeer is one end of a vsock connection in a test's virtual machine.
//
//	vsockpeer cid              prints the CID of this machine
//	vsockpeer bind PORT        binds the port and ends
//	vsockpeer dial CID PORT    writes a line, and prints the line that comes back
//	vsockpeer call CID PORT MESSAGE
//	                           writes the message and a NUL, and prints what comes back up to a NUL
//	vsockpeer serve PORT       answers each connection with the peer's CID and port, then with what it gets
//
// Where the kernel says no, it prints the name of the error, such as EACCES, and ends with status 1. It is for tests
// only: it serves whoever comes.
package main

import (
	"fmt"
	"os"
)

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stdout, errorName(err))
		fmt.Fprintln(os.Stderr, "vsockpeer:", err)
		os.Exit(1)
	}
}
