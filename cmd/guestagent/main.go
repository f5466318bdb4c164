// Guestagent takes a virtual machine's credentials from its host into
// systemd's credential store.
//
// Usage: guestagent [--root DIR] import | pull | serve | status | check-config | version
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/guestagent/guestagent/internal/agent"
)

// version is set by the linker.
var version = "devel"

const usage = `Usage: guestagent [--root DIR] COMMAND

Commands:
  import         take the credentials in the VM's SMBIOS OEM strings into the store
      --dry-run  change nothing, say what would come of it
      --json     print the report as JSON
      --pid1-credentials DIR
                 PID 1's credentials are in DIR/system and DIR/encrypted, and not
                 in /run/credentials, which a sandboxed service does not see
  pull           ask the host's provider for the VM's credentials, and wait until they
                 are in force
      --pid1-credentials DIR
                 as for import
  status         tell which credentials are there, and what was refused and why
      --json     print the report as JSON
  serve          answer the host on vsock port 1022, and root on the local socket;
                 hand credentials to units on the credentials socket
      --idle TIME
                 end when nobody has called for that long; systemd starts it again
      --pid1-credentials DIR
                 as for import
  check-config   tell what is wrong with /etc/guestagent/config.json
  version        print the version

  --root DIR     look up every path below DIR, for tests and images

Exit status: 0 done, 1 failed, 2 wrong usage. A credential that was refused is
reported and does not make import fail.
`

// A usageError is a command line that makes no sense.
type usageError struct{ msg string }

func (e usageError) Error() string { return e.msg + " (guestagent --help tells more)" }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err == nil {
		return
	}
	fmt.Fprintln(os.Stderr, "guestagent:", err)
	if errors.As(err, new(usageError)) {
		os.Exit(2)
	}
	os.Exit(1)
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	// First of all: what follows has secrets in memory.
	if err := agent.Harden(); err != nil {
		return err
	}
	var root string
	help := false
	args, err := parse(args, func(f *flag.FlagSet) {
		f.StringVar(&root, "root", "/", "")
	}, &help)
	if err != nil {
		return err
	}
	if help {
		_, err := io.WriteString(stdout, usage)
		return err
	}
	if len(args) == 0 {
		_, _ = io.WriteString(stderr, usage)
		return usageError{"no command"}
	}
	a := &agent.Agent{Version: version, Root: root}
	command, args := args[0], args[1:]
	var dryRun, asJSON bool
	var idle time.Duration
	args, err = parse(args, func(f *flag.FlagSet) {
		switch command {
		case "import":
			f.BoolVar(&dryRun, "dry-run", false, "")
			f.StringVar(&a.PID1Credentials, "pid1-credentials", "", "")
			f.BoolVar(&asJSON, "json", false, "")
		case "pull":
			f.StringVar(&a.PID1Credentials, "pid1-credentials", "", "")
		case "serve":
			f.DurationVar(&idle, "idle", agent.DefaultIdle, "")
			f.StringVar(&a.PID1Credentials, "pid1-credentials", "", "")
		case "status":
			f.BoolVar(&asJSON, "json", false, "")
		}
		f.StringVar(&a.Root, "root", root, "")
	}, &help)
	switch {
	case err != nil:
		return err
	case help:
		_, err := io.WriteString(stdout, usage)
		return err
	case len(args) > 0:
		// Not quoted: it may be a secret that somebody put on the command line.
		return usageError{fmt.Sprintf("%s takes no arguments", command)}
	}

	switch command {
	case "import":
		report, err := a.Import(ctx, dryRun)
		return errors.Join(write(stdout, report, asJSON), err)
	case "status":
		report, err := a.Ask(ctx)
		if err != nil {
			return err
		}
		return write(stdout, report, asJSON)
	case "pull":
		return a.PullNotifying(ctx, newLog(stderr))
	case "serve":
		return a.ServeActivated(ctx, idle, newLog(stderr))
	case "check-config":
		path, faults, err := a.CheckConfig()
		if err != nil {
			return err
		}
		for _, f := range faults {
			fmt.Fprintf(stderr, "%s: %s\n", path, f)
		}
		if len(faults) > 0 {
			return fmt.Errorf("%d faults in the configuration; the rest of it applies", len(faults))
		}
		return nil
	case "version":
		_, err := fmt.Fprintln(stdout, "guestagent", version)
		return err
	}
	return usageError{"no such command"}
}

// parse reads flags up to the first argument that is none.
func parse(args []string, define func(*flag.FlagSet), help *bool) ([]string, error) {
	f := flag.NewFlagSet("guestagent", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	define(f)
	err := f.Parse(args)
	if errors.Is(err, flag.ErrHelp) {
		*help = true
		return nil, nil
	}
	if err != nil {
		return nil, usageError{err.Error()}
	}
	return f.Args(), nil
}

// newLog logs to w. The journal has the time by itself.
func newLog(w io.Writer) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && a.Key == slog.TimeKey && os.Getenv("JOURNAL_STREAM") != "" {
				return slog.Attr{}
			}
			return a
		},
	}))
}

func write(w io.Writer, r *agent.Report, asJSON bool) error {
	if asJSON {
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return enc.Encode(r)
	}
	// What the journal reads from a service's output may begin with its
	// priority (sd-daemon(3)).
	warn := ""
	if os.Getenv("JOURNAL_STREAM") != "" {
		warn = "<4>"
	}
	return r.WriteText(w, warn)
}
