package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"

	"github.com/godbus/dbus/v5"
)

// askConfidential asks PID 1 which kind of confidential virtualization this
// is: "" for none. What PID 1 decides the same question by needs devices and
// processor registers that a sandboxed service does not see. Before systemd 254
// it does not know; then the kernel's guest devices tell.
func (a *Agent) askConfidential(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, pid1Timeout)
	defer cancel()
	kind, err := confidentialVirtualization(ctx, a.path(pathPID1Socket))
	if err == nil {
		return kind, nil
	}
	for p, kind := range map[string]string{pathSevGuest: "sev-snp", pathTDXGuest: "tdx"} {
		if _, statErr := os.Stat(a.path(p)); statErr == nil {
			return kind, nil
		}
	}
	var unknown dbus.Error
	if errors.Is(err, fs.ErrNotExist) || errors.As(err, &unknown) && unknown.Name == "org.freedesktop.DBus.Error.UnknownProperty" {
		return "", nil
	}
	return "", err
}

// confidentialVirtualization reads one named property of the manager object,
// over the socket that PID 1 serves by itself: the bus is not up yet when the
// import runs.
func confidentialVirtualization(ctx context.Context, socket string) (string, error) {
	conn, err := dbus.Dial("unix:path="+dbus.EscapeBusAddressValue(socket), dbus.WithContext(ctx))
	if err != nil {
		return "", fmt.Errorf("connecting to systemd: %w", err)
	}
	defer conn.Close()
	// The uid, so that nothing looks up a user's name.
	if err := conn.Auth([]dbus.Auth{dbus.AuthExternal(strconv.Itoa(os.Geteuid()))}); err != nil {
		return "", fmt.Errorf("introducing ourselves to systemd: %w", err)
	}
	var v dbus.Variant
	obj := conn.Object("org.freedesktop.systemd1", "/org/freedesktop/systemd1")
	err = obj.CallWithContext(ctx, "org.freedesktop.DBus.Properties.Get", 0, "org.freedesktop.systemd1.Manager", "ConfidentialVirtualization").Store(&v)
	if err != nil {
		return "", fmt.Errorf("asking systemd for ConfidentialVirtualization: %w", err)
	}
	switch kind, ok := v.Value().(string); {
	case !ok:
		return "", errors.New("systemd's ConfidentialVirtualization is not a string")
	case kind == "none":
		return "", nil
	default:
		return kind, nil
	}
}
