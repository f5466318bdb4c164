package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/guestagent/guestagent/credstore"
	"github.com/guestagent/guestagent/vsockrpc"
)

const (
	// ringFirst and ringMost are the pauses between two attempts while a boot
	// may wait; ringLate is the longest one afterwards.
	ringFirst = 100 * time.Millisecond
	ringMost  = 2 * time.Second
	ringLate  = 30 * time.Second
	// ringTimeout bounds one attempt. A provider that is still busy with the
	// last one when the next comes does not begin anew.
	ringTimeout = 15 * time.Second
	// maxRingAnswer bounds the provider's answer, in bytes.
	maxRingAnswer = 64 << 10
)

// ErrProviderUnreachable is matched by the error of [Agent.Pull] where
// provider.required is set, and time was up.
var ErrProviderUnreachable = errors.New("the provider has not handed over its set")

// A Pulling says how the provider is to be asked.
type Pulling struct {
	// Log gets what happens. It must not be nil.
	Log *slog.Logger
	// Ready is called once, when the boot may go on: the set is in force, nobody
	// is to be asked, or time is up. Nil for nobody.
	Ready func()
	// Status is told in one line how it gets on. Nil for nobody.
	Status func(line string)
}

// Pull asks the host's provider for the VM's set, and returns when that is in
// force. It rings, and the provider calls the agent: no credential comes this
// way, since anybody in the guest may dial the host, and only root can be where
// the provider calls.
//
// After provider.timeout the boot goes on without, while Pull goes on asking;
// or, where provider.required says so, Pull ends with [ErrProviderUnreachable].
// Where no provider is named, it returns at once.
func (a *Agent) Pull(ctx context.Context, p Pulling) error {
	r := &Report{}
	cfg := a.config(r)
	for _, n := range r.Reasons {
		p.Log.Warn("a part of the configuration does not apply", slog.String("code", string(n.Code)), slog.String("detail", n.Detail))
	}
	ready, status := p.Ready, p.Status
	if ready == nil {
		ready = func() {}
	}
	ready = sync.OnceFunc(ready)
	if status == nil {
		status = func(string) {}
	}
	target, from, err := a.providerAddress(ctx, cfg)
	if err != nil {
		return a.cannotPull(cfg, err, p.Log, ready, status)
	}
	if from == "" {
		status("no provider is named")
		ready()
		a.forgetPull(p.Log)
		return nil
	}
	pull := &pull{a: a, cfg: cfg, target: target, from: from, log: p.Log, ready: ready, status: status}
	return pull.run(ctx)
}

// cannotPull is what becomes of a provider whose address is not known: nothing
// will come of waiting.
func (a *Agent) cannotPull(cfg Config, err error, log *slog.Logger, ready func(), status func(string)) error {
	problem := vsockrpc.Escape(err.Error(), maxProblem)
	status(problem)
	note := pullNote{State: vsockrpc.ProviderUnreachable, Since: time.Now().UTC(), Problem: problem}
	if noteErr := a.notePull(note); noteErr != nil {
		err = errors.Join(err, noteErr)
	}
	if cfg.Provider.Required {
		return fmt.Errorf("%w: %w", ErrProviderUnreachable, err)
	}
	log.Error("the provider cannot be asked; the boot goes on without", slog.String("error", err.Error()))
	ready()
	return nil
}

func (a *Agent) notePull(note pullNote) error {
	tx, err := a.store().Begin()
	if err != nil {
		return err
	}
	defer tx.Close()
	return saveNote(tx, credstore.NotePull, note)
}

// forgetPull takes back what an earlier run noted, which was told of a provider.
func (a *Agent) forgetPull(log *slog.Logger) {
	tx, err := a.store().View()
	if err != nil {
		return
	}
	_, asked := readNote[pullNote](tx, credstore.NotePull)
	tx.Close()
	if !asked {
		return
	}
	if err := a.notePull(pullNote{State: vsockrpc.ProviderNone, Since: time.Now().UTC()}); err != nil {
		log.Warn("keeping how the pull gets on failed", slog.String("error", err.Error()))
	}
}

// providerDid reports whether the provider's set was applied in this boot.
func (a *Agent) providerDid() bool {
	tx, err := a.store().View()
	if err != nil {
		return false
	}
	defer tx.Close()
	return hasProvided(tx)
}

// A pull is one run of [Agent.Pull] with a provider.
type pull struct {
	a      *Agent
	cfg    Config
	target vsockrpc.Target
	from   string
	log    *slog.Logger
	ready  func()
	status func(string)

	late    bool   // time is up, and it goes on
	problem string // of the last attempt
	state   string // as it was noted last, since then
	since   time.Time
}

func (p *pull) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()

	up := time.NewTimer(p.cfg.Provider.Timeout)
	defer up.Stop()
	// A provider that called already, or in an earlier run, is rung all the same:
	// its set may have changed. But nobody waits for that.
	before := p.a.providerDid()
	if before {
		p.ready()
	}
	p.note(vsockrpc.ProviderWaiting)
	p.log.Info("asking the provider", slog.String("address", p.target.String()), slog.String("from", p.from))
	p.status("asking " + p.target.String())
	changed := make(chan struct{}, 1)
	for _, dir := range p.a.store().Folders() {
		wg.Go(func() {
			if err := watchFolder(ctx, dir, changed); err != nil && ctx.Err() == nil {
				p.log.Warn("watching the store failed; only the provider's answer tells", slog.String("error", err.Error()))
			}
		})
	}
	for pause := ringFirst; ; pause = min(2*pause, p.mostPause()) {
		attempt := make(chan error, 1)
		wg.Go(func() { attempt <- p.ring(ctx) })
		done, err := p.await(ctx, attempt, changed, up.C, before)
		if done || err != nil {
			return err
		}
		next := make(chan error, 1)
		t := time.AfterFunc(pause, func() { next <- errPause })
		done, err = p.await(ctx, next, changed, up.C, before)
		t.Stop()
		if done || err != nil {
			return err
		}
	}
}

// errPause is the end of a pause.
var errPause = errors.New("it is time to try again")

func (p *pull) mostPause() time.Duration {
	if p.late {
		return ringLate
	}
	return ringMost
}

// await waits for the end of an attempt or of a pause, and reports whether the
// provider's set is in force. An error ends the pull.
func (p *pull) await(ctx context.Context, attempt <-chan error, changed <-chan struct{}, up <-chan time.Time, before bool) (done bool, err error) {
	for {
		select {
		case err := <-attempt:
			switch {
			case errors.Is(err, errPause):
			case ctx.Err() != nil:
				return false, context.Cause(ctx)
			case (err == nil || !before) && p.a.providerDid():
				p.done()
				return true, nil
			case err == nil:
				err = errors.New("it says that its set is in force, and none has come")
				fallthrough
			default:
				p.failed(err)
			}
			return false, nil
		case <-changed:
			if !before && p.a.providerDid() {
				p.done()
				return true, nil
			}
		case <-up:
			if before {
				p.status("the set that the provider handed over in this boot is in force")
				return true, nil
			}
			if p.a.providerDid() {
				p.done()
				return true, nil
			}
			if err := p.timeIsUp(); err != nil {
				return false, err
			}
		case <-ctx.Done():
			return false, context.Cause(ctx)
		}
	}
}

// ring asks the provider once.
func (p *pull) ring(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, ringTimeout)
	defer cancel()
	c, err := vsockrpc.Dialer{MessageLimit: maxRingAnswer}.Dial(ctx, p.target)
	if err != nil {
		return err
	}
	defer c.Close()
	return vsockrpc.Provider{Client: c}.Ring(ctx)
}

// failed notes why an attempt came to nothing.
func (p *pull) failed(err error) {
	problem := vsockrpc.Escape(err.Error(), maxProblem)
	if problem == p.problem {
		return
	}
	p.problem = problem
	p.log.Warn("the provider did not answer as it should; trying again", slog.String("problem", problem))
	state := vsockrpc.ProviderWaiting
	if p.late {
		state = vsockrpc.ProviderUnreachable
	}
	p.status(fmt.Sprintf("asking %s: %s", p.target, problem))
	p.note(state)
}

// maxProblem bounds what is repeated of a provider's words, in bytes.
const maxProblem = 400

// timeIsUp lets the boot go on, or ends the pull.
func (p *pull) timeIsUp() error {
	p.late = true
	p.note(vsockrpc.ProviderUnreachable)
	p.status(fmt.Sprintf("provider unreachable, still asking %s: %s", p.target, p.problem))
	if p.cfg.Provider.Required {
		return fmt.Errorf("asking %s for %s: %w: %s", p.target, p.cfg.Provider.Timeout, ErrProviderUnreachable, cmp.Or(p.problem, "no answer"))
	}
	p.log.Error("provider unreachable; the boot goes on without, and it is asked again", slog.String("address", p.target.String()), slog.String("problem", p.problem))
	p.ready()
	return nil
}

// done ends the pull.
func (p *pull) done() {
	p.problem = ""
	p.note(vsockrpc.ProviderInForce)
	p.log.Info("the provider's set is in force", slog.String("address", p.target.String()))
	p.status("the provider's set is in force")
	p.ready()
}

// note keeps how the pull gets on, for reports.
func (p *pull) note(state string) {
	if p.state != state {
		p.state, p.since = state, time.Now().UTC()
	}
	if err := p.a.notePull(pullNote{Address: p.target.String(), State: state, Since: p.since, Problem: p.problem}); err != nil {
		p.log.Warn("keeping how the pull gets on failed", slog.String("error", err.Error()))
	}
}

// PullNotifying is Pull, as a service that tells systemd how it gets on
// (sd_notify(3)). It returns nil where it is told to end.
func (a *Agent) PullNotifying(ctx context.Context, log *slog.Logger) error {
	stayLean()
	notify := func(state string) {
		if _, err := daemon.SdNotify(false, state); err != nil {
			log.Warn("telling systemd failed", slog.String("error", err.Error()))
		}
	}
	err := a.Pull(ctx, Pulling{
		Log:    log,
		Ready:  func() { notify(daemon.SdNotifyReady) },
		Status: func(line string) { notify("STATUS=" + line) },
	})
	if ctx.Err() != nil {
		return nil //nolint:nilerr // told to end
	}
	return err
}
