package main

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Offsets in struct seccomp_data, linux/seccomp.h. Of the first argument the lower half, on a little-endian machine.
const (
	offsetNumber   = 0
	offsetArch     = 4
	offsetArgument = 16
)

// denyVsock makes socket(AF_VSOCK) fail as it does on a kernel without vsock, with EAFNOSUPPORT, in this thread and in
// what it starts from now on. It stops no program that means to get around it: calls of other architectures pass.
func denyVsock() error {
	const (
		load   = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		equal  = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		answer = unix.BPF_RET | unix.BPF_K
	)
	filter := []unix.SockFilter{
		{Code: load, K: offsetArch},
		{Code: equal, K: unix.AUDIT_ARCH_X86_64, Jf: 5},
		{Code: load, K: offsetNumber},
		{Code: equal, K: unix.SYS_SOCKET, Jf: 3},
		{Code: load, K: offsetArgument},
		{Code: equal, K: unix.AF_VSOCK, Jf: 1},
		{Code: answer, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EAFNOSUPPORT)},
		{Code: answer, K: unix.SECCOMP_RET_ALLOW},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]} //nolint:gosec // it is eight
	_, _, errno := unix.Syscall(unix.SYS_PRCTL, unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER,
		uintptr(unsafe.Pointer(&program))) //nolint:gosec // the kernel takes the address of the program
	if errno != 0 {
		return fmt.Errorf("turning off vsock: %w", errno)
	}
	return nil
}
