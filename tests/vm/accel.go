package vm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/guestagent/guestagent/tests/vm/internal/wire"
)

const (
	accelKVM = "kvm"
	accelTCG = "tcg"

	accelFile    = "accel.json"
	probeTimeout = time.Minute
)

// verdict says whether KVM works here. It is kept in the cache folder.
type verdict struct {
	// Host names the kernel and the processor it was found for.
	Host string `json:"host"`
	KVM  bool   `json:"kvm"`
}

// cpuModel returns the CPU that a guest gets. In QEMU 7.2's emulation "max", or cx16 left on, makes some boots crash in
// the guest's slab allocator.
func cpuModel(accel string) string {
	if accel == accelKVM {
		return "host"
	}
	return "Haswell-noTSX,-cx16"
}

// chooseAccel returns what to run guests with, and whether that was found by a probe. KVM's device says little: inside
// another VM it may open, and guests die all the same. So a guest is run.
func chooseAccel(ctx context.Context, img *Image, guest, dir string) (accel string, probed bool, err error) {
	switch forced := os.Getenv("GUESTAGENT_VM_ACCEL"); forced {
	case accelKVM, accelTCG:
		return forced, false, nil
	case "":
	default:
		return "", false, fmt.Errorf("reading GUESTAGENT_VM_ACCEL: %q is neither %s nor %s", forced, accelKVM, accelTCG)
	}
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return accelTCG, false, nil
	}
	_ = f.Close()
	host := hostID()
	v, ok := loadVerdict(host)
	if !ok {
		works, err := probeKVM(ctx, img, guest, dir)
		if err != nil {
			return "", false, fmt.Errorf("probing KVM: %w", err)
		}
		v = verdict{Host: host, KVM: works}
		saveVerdict(v)
	}
	if v.KVM {
		return accelKVM, true, nil
	}
	return accelTCG, true, nil
}

// probeKVM boots the image's kernel with the guest program alone, which turns the machine off at once.
func probeKVM(ctx context.Context, img *Image, guest, dir string) (bool, error) {
	initrd := filepath.Join(dir, "probe.cpio")
	f, err := os.OpenFile(initrd, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return false, err
	}
	err = tree{}.writeOverlay(f, []File{{Path: "/init", Mode: 0o755, Source: guest}, {Path: "/dev", Dir: true}})
	if err := errors.Join(err, f.Close()); err != nil {
		return false, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, probeTimeout, errProbe)
	defer cancel()
	console := newTail(tailBytes)
	q, err := startQEMU([]string{
		"-nodefaults", "-no-user-config", "-machine", "q35", "-accel", accelKVM, "-cpu", cpuModel(accelKVM),
		"-smp", "2", "-m", "512", "-nic", "none", "-display", "none", "-no-reboot",
		"-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
		"-kernel", img.Kernel, "-initrd", initrd, "-append", "console=ttyS0 panic=-1",
	}, console)
	if err != nil {
		return false, err
	}
	select {
	case <-q.done:
	case <-ctx.Done():
		q.kill()
		if !errors.Is(context.Cause(ctx), errProbe) {
			return false, ctx.Err()
		}
	}
	return q.err == nil && !q.kvmBroken() && bytes.Contains(console.Bytes(), []byte(wire.ProbeMarker)), nil
}

var errProbe = errors.New("the probe took too long")

func hostID() string {
	model := "unknown"
	data, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(data)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			model = strings.TrimSpace(value)
			break
		}
	}
	return kernelRelease() + ", " + model
}

func loadVerdict(host string) (verdict, bool) {
	var v verdict
	cache, err := CacheDir()
	if err != nil {
		return v, false
	}
	data, err := os.ReadFile(filepath.Join(cache, accelFile))
	if err != nil || json.Unmarshal(data, &v) != nil || v.Host != host {
		return verdict{}, false
	}
	return v, true
}

// saveVerdict keeps v for the next time. Where it cannot, the next time costs another probe.
func saveVerdict(v verdict) {
	cache, err := CacheDir()
	if err != nil {
		return
	}
	data, err := json.Marshal(v)
	if err != nil {
		return
	}
	f, err := os.CreateTemp(cache, "tmp-accel-")
	if err != nil {
		return
	}
	_, err = f.Write(append(data, '\n'))
	if errors.Join(err, f.Close()) != nil || os.Rename(f.Name(), filepath.Join(cache, accelFile)) != nil {
		_ = os.Remove(f.Name())
	}
}
