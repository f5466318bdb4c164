package host

import (
	"log/slog"

	"github.com/coreos/go-systemd/v22/daemon"
)

// The states that a service tells of itself (sd_notify(3)).
const (
	NotifyReady    = daemon.SdNotifyReady
	NotifyStopping = daemon.SdNotifyStopping
)

// Notify tells the service manager how this service is. Where there is none, or
// it cannot be told, the service goes on.
func Notify(log *slog.Logger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.Warn("telling systemd failed", slog.String("error", err.Error()))
	}
}
