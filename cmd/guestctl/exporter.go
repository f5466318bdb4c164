package main

import (
	"errors"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/guestagent/guestagent/internal/host"
)

// exporterAddress is where the exporter listens. The port is none that another
// exporter is known to have.
const exporterAddress = "127.0.0.1:9774"

func (p *program) exporter() *cobra.Command {
	var address string
	cmd := &cobra.Command{
		Use:   "exporter",
		Short: "Tell Prometheus how all VMs of this host are",
		Long: `exporter tells Prometheus, over HTTP, how all VMs of the registry are: /metrics. At
/healthz it says whether it works. A VM that is added or removed is noticed within
10 s.

It asks each VM's provider (see guestctl provide) on its local socket, and the
guest itself only where there is none. So it needs no privilege but to connect
to those sockets: run it as a user of the group that the providers have as their
--report-group. It answers from memory: no guest delays a scrape.

Whoever can connect may read. Where systemd hands over a socket, that one is
taken, and --listen is not.

guestagent-exporter.service runs it.`,
		Example: `  guestctl exporter
  guestctl exporter --listen '[::1]:9774' --vms /etc/guestagent/vms.d`,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usage(cmd, "exporter takes no arguments but flags")
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			listeners, err := host.ListenExporter(ctx, address)
			if errors.Is(err, host.ErrListenAddress) {
				return usage(cmd, "--listen takes HOST:PORT, such as "+exporterAddress)
			}
			if err != nil {
				return err
			}
			log := p.serviceLog()
			e := &host.Exporter{
				Registry: p.registry(), Listeners: listeners, Version: version, Log: log,
				Ready: func() { host.Notify(log, host.NotifyReady) },
			}
			err = e.Run(ctx)
			host.Notify(log, host.NotifyStopping)
			return err
		},
	}
	cmd.Flags().StringVar(&address, "listen", exporterAddress, "listen at `HOST:PORT`")
	return cmd
}

// serviceLog is the log of a command that runs as a service.
func (p *program) serviceLog() *slog.Logger {
	return slog.New(slog.NewTextHandler(p.stderr, &slog.HandlerOptions{ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
		if len(groups) == 0 && a.Key == slog.TimeKey && os.Getenv("JOURNAL_STREAM") != "" {
			return slog.Attr{} // the journal has it
		}
		return a
	}}))
}
