package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/guestagent/guestagent/internal/host"
	"github.com/guestagent/guestagent/vsockrpc"
)

// vsockWait bounds the wait for a host that has no vsock yet.
const vsockWait = 30 * time.Second

// stateDir is where providers keep what a restart should know. It lies in
// memory.
const stateDir = "/run/guestagent/provide"

// maxSocketPath is the longest path of a Unix socket, in bytes.
const maxSocketPath = 107

// provideFlags are those of guestctl provide.
type provideFlags struct {
	vm, listen, listenMux, target string
	cid                           uint32
	source                        host.Folder
	refresh                       refreshFlags
	state, socket, group, owner   string
}

func (p *program) provide() *cobra.Command {
	var flags provideFlags
	cmd := &cobra.Command{
		Use:   "provide (--vm NAME | --listen vsock::PORT --cid CID | --listen-mux SOCKET) --dir DIR",
		Short: "Hand a VM its credentials when it boots, and keep them up to date",
		Long: `provide is the host's end for one VM, as a service in the foreground. A guest that
boots rings; provide then calls the agent in it and hands over the credentials in
DIR, and pushes what changes there from then on. It may be started before the VM
or after it. The guest's agent takes these names from nobody else.

A ring is given nothing: any process in a guest can dial the host. What is handed
over goes to the port that only root in the guest can have.

Over AF_VSOCK the VMs of a host share its ports: each provider has a PORT of its
own, from 768 to 1021. SOCKET must lie in a folder that belongs to the VMM's user,
or that only root can write to; neither may be a symbolic link.

DIR is read anew when it changes, on SIGHUP, and whenever the guest boots. Where
systemd fills it ($CREDENTIALS_DIRECTORY), it changes at a reload with
RefreshOnReload=credentials (systemd 260), or with a restart of this service.
Neither touches the VM.

How the guest is, is told to systemd (STATUS=), and on a socket of its own to
whoever may connect there: by default root, with --report-group a group.`,
		Example: `  guestctl provide --vm web --dir "$CREDENTIALS_DIRECTORY"
  guestctl provide --listen-mux /var/lib/microvms/web/notify.vsock --dir /run/secrets/web --refresh auto --gate 1m
  guestctl provide --listen vsock::1020 --cid 3 --dir /run/secrets/web`,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usage(cmd, "provide takes no arguments but flags")
			}
			return p.provideTo(cmd, &flags)
		},
	}
	f := cmd.Flags()
	f.StringVar(&flags.vm, "vm", "", "provide for the VM `NAME`")
	f.StringVar(&flags.listen, "listen", "", "be rung at `ADDRESS`, vsock::PORT, with --cid")
	f.Uint32Var(&flags.cid, "cid", 0, "provide for the guest with this `CID`, with --listen vsock::PORT")
	f.StringVar(&flags.listenMux, "listen-mux", "", "provide for the guest whose VMM has its vsock at `SOCKET`: be rung at SOCKET_1021")
	f.StringVar(&flags.target, "target", "", "call the agent at `TARGET`, with --listen unix:PATH")
	f.StringVar(&flags.source.Dir, "dir", "", "hand over every file of `DIR`, such as $CREDENTIALS_DIRECTORY")
	f.StringVar(&flags.source.Prefix, "prefix", "", "take only the files that begin with `P`, and take it off")
	f.StringVar(&flags.source.Map, "map", "", "take the files that `FILE` names, under the names that it gives: {\"credentials\": [{\"source\", \"name\", \"revision\", \"required\"}]}")
	f.StringVar(&flags.state, "state", "", "keep the values' labels in `DIR` (default "+stateDir+"/labels/NAME), which should lie in memory, and be this provider's alone")
	f.StringVar(&flags.socket, "socket", "", "tell how the guest is at `PATH` (default "+stateDir+"/NAME.sock)")
	f.StringVar(&flags.group, "report-group", "", "let the members of `GROUP` ask there")
	f.StringVar(&flags.owner, "socket-owner", "", "give the socket that the VMM connects to to `USER[:GROUP]` (default: the owner of its folder)")
	flags.refresh.add(cmd, setRefreshes)
	flags.refresh.addGate(cmd)
	_ = cmd.MarkFlagDirname("dir")
	_ = cmd.MarkFlagDirname("state")
	_ = cmd.MarkFlagFilename("map", "json")
	_ = cmd.RegisterFlagCompletionFunc("vm", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		guests, _ := p.registry().List()
		var names []string
		for _, g := range guests {
			names = append(names, g.Name)
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	})
	return cmd
}

// A place is where a provider is rung, and where it calls.
type place struct {
	name     string
	target   vsockrpc.Target
	port     uint32 // that the guest dials
	bell     string // a Unix socket to listen on instead
	provider host.ProviderAddress
}

// place works out which VM is meant.
func (f *provideFlags) place(cmd *cobra.Command, registry host.Registry) (place, error) {
	given := 0
	for _, s := range []string{f.vm, f.listen, f.listenMux} {
		if s != "" {
			given++
		}
	}
	if given != 1 {
		return place{}, usage(cmd, "name one of --vm, --listen and --listen-mux")
	}
	if f.listen == "" && (f.cid != 0 || f.target != "") {
		return place{}, usage(cmd, "--cid and --target go with --listen")
	}
	switch {
	case f.vm != "":
		guests, err := registry.Resolve(f.vm)
		if errors.Is(err, host.ErrTargets) || err == nil && (len(guests) != 1 || guests[0].Name != f.vm || strings.Contains(f.vm, ":")) {
			return place{}, usage(cmd, "--vm takes the name of one VM")
		}
		if err != nil {
			return place{}, err
		}
		g := guests[0]
		if g.Target.Scheme == vsockrpc.SchemeUnix {
			return place{}, usage(cmd, "the VM is reached over unix:PATH, and cannot ring: use --listen unix:PATH and --target")
		}
		return place{name: g.Name, target: g.Target, port: g.Provider.Port, provider: g.Provider}, nil
	case f.listenMux != "":
		t, err := vsockrpc.ParseTarget("vsock-mux:" + f.listenMux)
		if err != nil {
			return place{}, usage(cmd, "--listen-mux takes the path of the VM's vsock socket")
		}
		name, err := host.PathName(f.listenMux)
		return place{name: name, target: t, port: vsockrpc.DefaultProviderPort}, err
	}
	if path, ok := strings.CutPrefix(f.listen, "unix:"); ok {
		t, err := vsockrpc.ParseTarget(f.target)
		if err != nil || !filepath.IsAbs(path) || f.cid != 0 {
			return place{}, usage(cmd, "--listen unix:PATH takes an absolute path, and --target says where the agent is")
		}
		name, err := host.PathName(path)
		return place{name: name, target: t, bell: path}, err
	}
	port, ok := strings.CutPrefix(f.listen, "vsock::")
	n, err := strconv.ParseUint(port, 10, 32)
	switch {
	case !ok || err != nil || n == 0:
		return place{}, usage(cmd, "--listen takes vsock::PORT")
	case f.cid < 3 && f.cid != 1 || f.cid == math.MaxUint32: // 1 is this machine itself, and the largest any
		return place{}, usage(cmd, "--listen vsock::PORT needs --cid, the guest's")
	case f.target != "":
		return place{}, usage(cmd, "--target goes with --listen unix:PATH")
	}
	if err := host.CheckProviderPort(uint32(n)); err != nil {
		return place{}, usage(cmd, "--listen takes another port: "+err.Error())
	}
	return place{
		name: fmt.Sprintf("vsock-%d", f.cid), port: uint32(n),
		target: vsockrpc.Target{Scheme: vsockrpc.SchemeVsock, CID: f.cid, Port: vsockrpc.DefaultPort},
	}, nil
}

// provideTo runs the provider.
func (p *program) provideTo(cmd *cobra.Command, f *provideFlags) (err error) {
	where, err := f.place(cmd, p.registry())
	if err != nil {
		return err
	}
	if f.source.Dir == "" {
		return usage(cmd, "no --dir: where are the credentials?")
	}
	refresh, gate, err := f.refresh.get(cmd, setRefreshes)
	if err != nil {
		return err
	}
	if f.state == "" {
		// Not beside the sockets: a VM may be called web.sock.
		f.state = filepath.Join(stateDir, "labels", where.name)
	}
	if f.socket == "" {
		f.socket = where.provider.Socket
	}
	if f.socket == "" {
		if f.socket = filepath.Join(stateDir, where.name+".sock"); len(f.socket) > maxSocketPath {
			return usage(cmd, fmt.Sprintf("the path of the provider's own socket would be longer than %d bytes, and nobody could connect to it: choose one with --socket", maxSocketPath))
		}
	}
	log := p.serviceLog()
	// The lock first: of two providers of a VM, the second one ends here.
	local, err := host.ListenLocal(f.socket, f.group)
	if err != nil {
		return err
	}
	defer local.Close()
	labels, err := host.OpenLabels(f.state)
	if err != nil {
		return err
	}
	defer labels.Close()
	if problem := labels.Problem(); problem != "" {
		log.Warn("the values' labels begin anew", slog.String("problem", problem))
	}

	ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	reload := make(chan struct{}, 1)
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	go func() {
		for {
			select {
			case <-hup:
				select {
				case reload <- struct{}{}:
				default:
				}
			case <-ctx.Done():
				return
			}
		}
	}()

	pr := &host.Provider{
		Name: where.name, Target: where.target, Source: f.source, Labels: labels, Refresh: refresh, Gate: gate,
		Local: local, Reload: reload, Version: version, Log: log,
	}
	problem, err := f.doorbell(ctx, where, pr, log)
	if err != nil {
		return err
	}
	told := &teller{tell: func(line string) { host.Notify(log, "STATUS="+line) }, problem: problem}
	pr.Status = told.line
	// Whether the guest can ring is not waited for: something may stand in the
	// way of the socket for ever, and the guest is called all the same.
	host.Notify(log, host.NotifyReady)
	var wg sync.WaitGroup
	wg.Go(func() { told.look(ctx) })
	err = pr.Run(ctx)
	stop()
	wg.Wait()
	host.Notify(log, host.NotifyStopping)
	return err
}

// A teller tells how the guest is, and with it what keeps the guest from
// ringing.
type teller struct {
	tell    func(line string)
	problem func() string

	mu         sync.Mutex
	last, sent string
}

// tellerLook is how often a teller looks for another problem.
const tellerLook = time.Second

// line is told how the guest is.
func (t *teller) line(line string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.last = line
	t.sendLocked()
}

// look has what changes told, until ctx ends.
func (t *teller) look(ctx context.Context) {
	tick := time.NewTicker(tellerLook)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			t.mu.Lock()
			t.sendLocked()
			t.mu.Unlock()
		case <-ctx.Done():
			return
		}
	}
}

func (t *teller) sendLocked() {
	line := t.last
	if line == "" {
		return // it is about to be told
	}
	if p := t.problem(); p != "" {
		line += "; it cannot ring: " + p
	}
	if line != t.sent {
		t.sent = line
		t.tell(line)
	}
}

// doorbell opens the socket that the guest rings at. Problem is what keeps the
// guest from that at present.
func (f *provideFlags) doorbell(ctx context.Context, where place, pr *host.Provider, log *slog.Logger) (problem func() string, err error) {
	none := func() string { return "" }
	switch {
	case where.bell != "":
		pr.Doorbell, err = host.ListenLocal(where.bell, "")
		pr.May = host.LocalRoot
		return none, err
	case where.target.Scheme == vsockrpc.SchemeVsock:
		pr.Doorbell, err = vsockrpc.ListenVsock(ctx, where.port, vsockWait)
		pr.May = host.OnlyCID(where.target.CID)
		return none, err
	}
	cfg := host.MuxConfig{Path: where.target.Path, Port: where.port, Log: log}
	if f.owner != "" {
		if cfg.UID, cfg.GID, err = host.ParseOwner(f.owner); err != nil {
			return nil, err
		}
	}
	mux := host.ListenMux(cfg)
	if err := mux.Taken(); err != nil {
		_ = mux.Close()
		return nil, err
	}
	pr.Doorbell, pr.May = mux, mux.May
	return mux.Problem, nil
}
