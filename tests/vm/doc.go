// Package vm builds guest images, boots real virtual machines and containers with them and runs programs in those.
//
// An [Image] is a minimal Debian system, built once with debootstrap and kept in a cache under a hash of all that goes
// into it. [Boot] starts QEMU with such an image as initial RAM disk, so that a machine has no disk and no network and
// leaves nothing behind. A program in the guest ([Machine.Run], [Machine.ReadFile] and so on) is reached over a
// virtio-serial port, from early in the boot on, also when the boot hangs. KVM is used where a probe that runs a guest
// shows that it works, else QEMU's own emulation.
//
// With [VsockConfig] a guest has a vsock device, whose host side is a process of its own: see [DialVsock] and
// [ListenVsock]. Nothing of it needs root or a kernel module on the host. [Machine.Pause], [Machine.Reset] and
// [Machine.RestartVsock] do to a machine what happens to machines.
//
// [StartContainer] boots the same image with systemd-nspawn, in half a second: for the many cases that need a real
// systemd and neither a kernel of their own nor SMBIOS or vsock. It needs root.
//
// The package is for tests and for demonstrations. It guarantees that what it started is gone after [Machine.Close], and
// that an error of a boot ends with the last lines of the console. It does not protect the host from a guest beyond what
// QEMU or systemd-nspawn does, and the guest trusts the host without reserve. It knows nothing of package testing:
// helpers for tests are in package vmtest. It runs on Linux; building images needs root.
//
// Environment:
//
//	GUESTAGENT_VM_CACHE  folder for images and vhost-device-vsock; else guestagent/vm in the user's cache folder
//	GUESTAGENT_VM_ACCEL  kvm or tcg, instead of the probe
//	MIRROR               Debian mirror to take from; else the one apt uses; else debootstrap's own
package vm
