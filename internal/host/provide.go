package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/vsockrpc"
)

const (
	// callFirst and callMost are the pauses between attempts to call a guest
	// that does not answer. A guest that boots rings, and is called at once.
	callFirst = 250 * time.Millisecond
	callMost  = 10 * time.Second
	// briefMost is the longest pause before a guest is called that answered, and
	// hung up in less than callMost.
	briefMost = 2 * time.Second
	// againAfter is the pause after which a set is tried again that could not be
	// applied, for a reason that may pass.
	againAfter = 5 * time.Second
	// lookPause is the least time from one look at the guest's set to the next.
	lookPause = 250 * time.Millisecond
	// watchHeartbeat is how often a guest gives a sign, silence how long it is
	// waited for.
	watchHeartbeat = 20 * time.Second
	silence        = time.Minute
	// ringConns are the connections that a guest may have at its provider.
	ringConns = 8
	// statusConns are those on the local socket.
	statusConns = 64
	// maxReport bounds what a guest says of itself, in bytes, so that it fits into
	// the status.
	maxReport = vsockrpc.MessageLimit - 64<<10
	// ringMessage bounds what a guest may send, in bytes.
	ringMessage = 4 << 10
)

// A Provider hands the credentials of one VM to its guest, and keeps them up to
// date there: when the guest rings, as it does when it boots; when the source
// changes; and when the guest is reached anew, and has another set than it
// should, as after a restore. It always calls the guest's agent, on a port that
// only root in the guest can have. A ring brings nothing and is given nothing.
//
// Values are read when they are needed, and wiped when they were handed over.
type Provider struct {
	// Name is the VM's.
	Name string
	// Target is where the guest's agent listens.
	Target vsockrpc.Target
	// Source is where the credentials are.
	Source Folder
	// Labels gives the values their revisions. It must not be nil.
	Labels *Labels
	// Refresh and Gate are how the units are refreshed that load what changes,
	// as in [vsockrpc.ApplyParams]. A guest's first set of a boot has no gate.
	Refresh string
	Gate    time.Duration
	// Doorbell is where the guest rings, and is taken over. May says which peers
	// may; nil is nobody.
	Doorbell net.Listener
	May      func(vsockrpc.Peer) error
	// Local is where others ask how the guest is, nil for nowhere. Who may
	// connect to it may ask. It is taken over.
	Local net.Listener
	// Reload has the source read anew.
	Reload <-chan struct{}
	// Version is this program's.
	Version string
	// Status is told in one line how the guest is, whenever that changes, but not
	// more than twice a second. Nil for nobody.
	Status func(line string)
	// Log gets what happens. It must not be nil.
	Log *slog.Logger

	dial        func(context.Context, vsockrpc.Target) (*vsockrpc.Client, error) // nil is vsockrpc's
	again, look time.Duration                                                    // 0 are againAfter and lookPause

	// setting is held while the state is changed and logged, so that the last
	// line is the last state.
	setting sync.Mutex

	mu     sync.Mutex
	status vsockrpc.ProviderStatus // with what is kept of the report
	// changed is closed when the status is another, but for its LastContact.
	changed chan struct{}
	// offset is the guest's clock's, as the status had it when it changed last.
	offset time.Duration
	// rings are those that wait for the set to be in force.
	rings map[chan error]bool
	// last is what came of the set.
	last outcome

	wake  chan struct{} // there is something to do
	reach chan struct{} // the guest answers: watch it now
	step  Code          // at which reaching the guest failed last
	over  atomic.Bool   // Run ends
	retry atomic.Bool   // names that were refused are to be tried again
}

// Run runs the provider until ctx ends, or the doorbell fails for good.
func (p *Provider) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	p.wake, p.reach, p.changed = make(chan struct{}, 1), make(chan struct{}, 1), make(chan struct{})
	if p.dial == nil {
		p.dial = vsockrpc.Dialer{MessageLimit: maxReport}.Dial
	}
	p.again, p.look = cmp.Or(p.again, againAfter), cmp.Or(p.look, lookPause)
	p.status.Applies = noApplies()
	p.set(vsockrpc.GuestWaiting, "")
	defer context.AfterFunc(ctx, func() { p.over.Store(true) })()
	var wg sync.WaitGroup
	serve := func(s *vsockrpc.Server, l net.Listener) {
		wg.Go(func() {
			if err := s.Serve(ctx, l); err != nil && ctx.Err() == nil {
				cancel(fmt.Errorf("serving %s: %w", l.Addr(), err))
			}
		})
	}
	serve(p.doorbell(), p.Doorbell)
	if p.Local != nil {
		serve(p.local(), p.Local)
	}
	changed := make(chan struct{}, 1)
	wg.Go(func() {
		if err := p.Source.Watch(ctx, changed); err != nil && ctx.Err() == nil {
			p.Log.Error("watching the source failed; SIGHUP has it read anew", slog.String("error", err.Error()))
		}
	})
	wg.Go(func() {
		for {
			select {
			case <-changed:
			case <-p.Reload:
				p.retry.Store(true) // what stood in the way of a name may have gone
			case <-ctx.Done():
				return
			}
			p.poke()
		}
	})
	wg.Go(func() { p.watchGuest(ctx) })
	if p.Status != nil {
		wg.Go(func() { p.announce(ctx) })
	}
	p.keep(ctx)
	wg.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// poke has the set looked after.
func (p *Provider) poke() { poke(p.wake) }

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// doorbell is the server that the guest rings at.
func (p *Provider) doorbell() *vsockrpc.Server {
	return &vsockrpc.Server{
		Vendor: "guestagent", Product: "guestctl", Version: p.Version, URL: "https://github.com/guestagent/guestagent",
		Interfaces: []vsockrpc.Interface{{
			Name: vsockrpc.ProviderInterface, Description: vsockrpc.ProviderDescription,
			Methods: map[string]vsockrpc.Handler{"Ring": p.ring, "Status": nil, "Watch": nil},
		}},
		Authorize: p.May, Log: p.Log, MaxConns: ringConns, MessageLimit: ringMessage,
	}
}

// local is the server that others ask at. The socket's permissions say who may.
func (p *Provider) local() *vsockrpc.Server {
	return &vsockrpc.Server{
		Vendor: "guestagent", Product: "guestctl", Version: p.Version, URL: "https://github.com/guestagent/guestagent",
		Interfaces: []vsockrpc.Interface{{
			Name: vsockrpc.ProviderInterface, Description: vsockrpc.ProviderDescription,
			Methods: map[string]vsockrpc.Handler{"Ring": nil, "Status": p.tell, "Watch": p.watch},
		}},
		Authorize: func(peer vsockrpc.Peer) error {
			if peer.Local() {
				return nil
			}
			return vsockrpc.ErrRefused
		},
		Log: p.Log, MaxConns: statusConns,
	}
}

// ring waits until the set was found in force, or put there, after the call
// came. Many rings are one errand.
func (p *Provider) ring(ctx context.Context, call *vsockrpc.Call) error {
	if err := call.DecodeNone(); err != nil {
		return err
	}
	done := make(chan error, 1)
	p.mu.Lock()
	if p.rings == nil {
		p.rings = map[chan error]bool{}
	}
	p.rings[done] = true
	p.mu.Unlock()
	p.poke()
	select {
	case err := <-done:
		if err != nil {
			return err
		}
		return call.Reply(nil)
	case <-ctx.Done():
		p.mu.Lock()
		delete(p.rings, done)
		p.mu.Unlock()
		return context.Cause(ctx)
	}
}

// keep looks after the set whenever there is reason to.
func (p *Provider) keep(ctx context.Context) {
	p.poke()
	var again <-chan time.Time
	for {
		select {
		case <-p.wake:
		case <-again:
		case <-ctx.Done():
			return
		}
		// Anybody in the guest may ring, and as often as he likes.
		begun := time.After(p.look)
		p.mu.Lock()
		rings := p.rings
		p.rings = nil
		p.mu.Unlock()
		err := p.reconcile(ctx)
		again = nil
		if err != nil && err.after > 0 {
			again = time.After(err.after)
		}
		var answer error
		if err != nil {
			// What is wrong on the host is not the guest's to know.
			answer = &vsockrpc.UnavailableError{Problem: err.toGuest}
		}
		for done := range rings {
			done <- answer
		}
		select {
		case <-begun:
		case <-ctx.Done():
		}
	}
}

// A notYet says why the set is not in force.
type notYet struct {
	// toGuest is what the guest may know.
	toGuest string
	// after is when to try again; 0 is when something happens.
	after time.Duration
}

// reconcile has the guest's set be the source's. It is called by one goroutine.
func (p *Provider) reconcile(ctx context.Context) *notYet {
	creds, err := p.Source.Read()
	defer Wipe(creds)
	// A label that somebody gives may stay while the value changes.
	given := slices.ContainsFunc(creds, func(c vsockrpc.Credential) bool { return c.Revision != "" })
	if err == nil {
		err = p.label(creds)
	}
	if err != nil {
		p.set(vsockrpc.GuestUnreadable, err.Error())
		return &notYet{toGuest: "the host cannot read the credentials", after: callMost}
	}
	r, err := p.ask(ctx)
	if err != nil {
		p.waiting(failure(err, fateUntouched, ctx.Err() != nil))
		// Whoever watches tells when the guest can be reached.
		return &notYet{toGuest: "the agent cannot be reached from the host"}
	}
	p.heard(r, r.Time)
	poke(p.reach)
	p.tried(r, creds)
	o := p.outcome(r, creds)
	if _, pending := p.Labels.Pending(); pending || given && o.generation != r.Generation || !o.stands(r) {
		p.set(vsockrpc.GuestApplying, "")
		return p.apply(ctx, r, o, creds)
	}
	o.generation = r.Generation
	p.done(o)
	return nil
}

// An outcome is what came of a set, for as long as the guest has it so.
type outcome struct {
	bootID     string
	generation int64
	// want are the labels that the guest should have, by name; but for those
	// that it refused, or that its gate rolled back.
	want    map[string]string
	refused map[string]bool
	// state and problem are what to show.
	state, problem string
}

// outcome is what came of the set as it is now, where the guest has been given
// it in this boot.
func (p *Provider) outcome(r *vsockrpc.Report, creds []vsockrpc.Credential) outcome {
	p.mu.Lock()
	o := p.last
	p.mu.Unlock()
	if p.retry.Swap(false) {
		o.refused = nil
	}
	if o.bootID != r.BootID {
		o = outcome{bootID: r.BootID, generation: -1, state: vsockrpc.GuestInForce}
	}
	o.want = map[string]string{}
	for _, c := range creds {
		o.want[c.Name] = c.Revision
	}
	has := map[string]string{}
	for _, e := range r.Entries {
		has[e.Name] = e.Revision
	}
	refused := map[string]bool{}
	for _, c := range creds {
		revision, ok := has[c.Name]
		switch {
		case ok && revision == c.Revision: // refused once, and somebody had it tried again
		case o.refused[c.Name]:
			refused[c.Name] = true
		case ok && c.Rejected:
			// A provider before this one saw the gate.
			refused[c.Name] = true
			o.state, o.problem = vsockrpc.GuestRolledBack, p.Labels.Rejected()[c.Name]
		}
	}
	if o.refused = refused; len(refused) == 0 && o.state != vsockrpc.GuestInForce {
		o.state, o.problem = vsockrpc.GuestInForce, ""
	}
	return o
}

// stands reports whether the guest has the set as it was left. Its labels say
// so: no value has another's. A value that somebody put over the provider's
// stays until the provider has another.
func (o *outcome) stands(r *vsockrpc.Report) bool {
	if r.BootID != o.bootID || r.Provider == nil || r.Provider.State != vsockrpc.ProviderInForce || r.Gate != nil {
		return false
	}
	has := map[string]bool{}
	for _, e := range r.Entries {
		if e.Source != credential.SourceProvider && !e.Ephemeral {
			continue
		}
		has[e.Name] = true
		revision, ok := o.want[e.Name]
		if !ok || !o.refused[e.Name] && !e.Ephemeral && (e.Revision != revision || e.State == stateMissing) {
			return false
		}
	}
	for name := range o.want {
		if !has[name] && !o.refused[name] {
			return false
		}
	}
	return true
}

// stateMissing is the state of a value whose file somebody removed.
const stateMissing = "missing"

// done keeps what came of the set, and shows it.
func (p *Provider) done(o outcome) {
	p.mu.Lock()
	p.last = o
	p.mu.Unlock()
	p.set(o.state, o.problem)
}

// lastOutcome is what came of the set.
func (p *Provider) lastOutcome() outcome {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.last
}

// label labels the values. Labels that cannot be kept hold until the provider
// ends, and no guest has to go without its values for them.
func (p *Provider) label(creds []vsockrpc.Credential) error {
	err := p.Labels.Label(creds)
	if slices.ContainsFunc(creds, func(c vsockrpc.Credential) bool { return c.Revision == "" }) {
		return err
	}
	p.kept(err)
	return nil
}

// kept tells of labels that were not kept, if err says so.
func (p *Provider) kept(err error) {
	if err != nil {
		p.Log.Warn("keeping the labels failed", slog.String("error", err.Error()))
	}
}

// tried takes back that values are rejected that the guest has in force: there
// they were tried again. A guest that booted on them, for lack of others, says
// so.
func (p *Provider) tried(r *vsockrpc.Report, creds []vsockrpc.Credential) {
	if slices.ContainsFunc(r.Reasons, func(n vsockrpc.Reason) bool { return n.Code == codeRejectedInForce }) {
		return
	}
	var good []string
	for i := range creds {
		c := &creds[i]
		if c.Rejected && slices.ContainsFunc(r.Entries, func(e vsockrpc.Entry) bool {
			return e.Name == c.Name && e.Revision == c.Revision && e.Source == credential.SourceProvider && !e.Ephemeral
		}) {
			c.Rejected = false
			good = append(good, c.Name)
		}
	}
	if len(good) > 0 {
		p.kept(p.Labels.Accept(good))
	}
}

// codeRejectedInForce is a guest's reason: it booted on values that a gate had
// rolled back.
const codeRejectedInForce = "rejectedInForce"

// ask asks the guest how it is.
func (p *Provider) ask(ctx context.Context) (*vsockrpc.Report, error) {
	ctx, cancel := context.WithTimeout(ctx, DefaultTimeout)
	defer cancel()
	return askHealth(ctx, p.Target, p.dial)
}

// apply hands the set over. Report is what the guest said of itself just now.
func (p *Provider) apply(ctx context.Context, report *vsockrpc.Report, o outcome, creds []vsockrpc.Credential) *notYet {
	params := &vsockrpc.ApplyParams{Set: creds, Source: credential.SourceProvider, Partial: true, Prune: true, Refresh: p.Refresh}
	first := report.Provider == nil || report.Provider.State != vsockrpc.ProviderInForce
	if !first {
		params.Gate = p.Gate // before that there is nothing to go back to
	}
	begun := time.Now()
	res := p.push(ctx, params)
	if first && res.Error != nil && res.Error.Code == CodeNoSystemd {
		// So early in the boot nobody has loaded anything.
		params.Refresh = vsockrpc.RefreshNone
		res = p.push(ctx, params)
	}
	p.count(&res, time.Since(begun))
	o.refused, o.state, o.problem = map[string]bool{}, vsockrpc.GuestInForce, ""
	switch f := res.Error; {
	case f == nil || f.Code == CodeRefreshFailed:
		o.generation = *res.Generation
		if f != nil {
			o.problem = f.Message
		}
		p.refused(&o, res.Refusals)
	case f.Code == CodeRolledBack:
		o.generation, o.state, o.problem = *f.Generation, vsockrpc.GuestRolledBack, vsockrpc.Escape(f.Problem, maxDetail)
		changed, _ := p.Labels.Pending()
		for _, name := range changed {
			o.refused[name] = true
		}
		p.kept(p.Labels.Reject(changed, o.problem))
	case f.Code == CodeGateInProgress, f.Code == CodeRefused:
		p.set(vsockrpc.GuestApplying, f.Message)
		return &notYet{toGuest: "the agent does not take the set now", after: p.again}
	default:
		p.waiting(f)
		return &notYet{toGuest: "the set could not be handed over", after: p.again}
	}
	p.kept(p.Labels.Tried())
	p.done(o)
	return nil
}

// refused is the outcome of a set that is in force but for some names.
func (p *Provider) refused(o *outcome, refusals []credential.Refusal) {
	var rejected, lines []string
	for _, r := range refusals {
		o.refused[r.Name] = true
		if r.Reason == credential.ReasonRejected {
			// Where this provider did not see how the gate ended.
			rejected = append(rejected, r.Name)
		}
		lines = append(lines, vsockrpc.Escape(r.String(), maxDetail))
	}
	if len(lines) == 0 {
		return
	}
	const most = 3
	o.state, o.problem = vsockrpc.GuestRefused, strings.Join(lines[:min(most, len(lines))], "; ")
	if more := len(lines) - most; more > 0 {
		o.problem += fmt.Sprintf("; and %d more", more)
	}
	if len(rejected) > 0 {
		known := p.Labels.Rejected()
		if slices.ContainsFunc(rejected, func(name string) bool { _, ok := known[name]; return !ok }) {
			p.kept(p.Labels.Reject(rejected, o.problem))
		}
	}
	if len(rejected) == len(lines) {
		o.state = vsockrpc.GuestRolledBack
	}
}

// push calls Apply, and waits as long as the guest tells how it gets on.
func (p *Provider) push(ctx context.Context, params *vsockrpc.ApplyParams) Result {
	var res Result
	f := Fleet{
		Guests: []Guest{{Name: p.Name, Target: p.Target}}, dial: p.dial,
		Progress: func(Guest, vsockrpc.Progress) {
			p.heard(nil, "")
			Wipe(params.Set) // it is in force; what follows may take an hour
		},
	}
	_ = f.Push(ctx, params, func(r Result) { res = r }) // the error is the result's
	return res
}

// watchGuest stays connected to the guest, whenever that can be reached, and has
// the set looked after when it is another guest than the one that got it: it
// booted, or was restored.
func (p *Provider) watchGuest(ctx context.Context) {
	for pause := callFirst; ; pause = min(2*pause, callMost) {
		begun := time.Now()
		reached, err := p.watchOnce(ctx)
		if ctx.Err() != nil {
			return
		}
		reach := p.reach
		switch brief := time.Since(begun) < callMost; {
		case reached && brief:
			// One that hangs up after each answer is called less often, and may ring as
			// it likes; one that has booted may do so once.
			pause, reach = min(pause, briefMost), nil
		case reached:
			pause = callFirst
		}
		f := failure(err, fateUntouched, false)
		p.Log.Debug("the guest cannot be watched", slog.String("vm", p.Name), slog.String("problem", f.Message))
		if reached || p.current() != vsockrpc.GuestUnreadable {
			p.lost(f)
		}
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-reach:
			pause = callFirst
		case <-ctx.Done():
		}
		t.Stop()
	}
}

func (p *Provider) current() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.status.State
}

// lost says that the guest does not answer, unless it is being worked on.
func (p *Provider) lost(f *Failure) {
	if p.current() != vsockrpc.GuestApplying {
		p.waiting(f)
	}
}

// waiting says that the guest does not answer, and at which step: once, for a
// step that fails now with this error of the kernel's and now with that.
func (p *Provider) waiting(f *Failure) {
	p.mu.Lock()
	same := p.status.State == vsockrpc.GuestWaiting && p.step == f.Code && f.Status() == StatusUnreachable
	p.step = f.Code
	p.mu.Unlock()
	if !same {
		p.set(vsockrpc.GuestWaiting, f.Message)
	}
}

// watchOnce watches over one connection, until that ends.
func (p *Provider) watchOnce(ctx context.Context) (reached bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	quiet := time.AfterFunc(silence, func() { cancel(context.DeadlineExceeded) })
	defer quiet.Stop()
	c, err := p.dial(ctx, p.Target)
	if err != nil {
		return false, err
	}
	defer c.Close()
	for reply, err := range (vsockrpc.Health{Client: c}).Watch(ctx, watchHeartbeat) {
		if err != nil {
			return reached, err
		}
		quiet.Reset(silence)
		r, pause := reply.Report, readPause
		if p.heard(r, toldTime(&reply)) {
			pause = largePause
		}
		switch o := p.lastOutcome(); {
		case p.current() == vsockrpc.GuestWaiting,
			r != nil && !o.stands(r),
			r != nil && o.state == vsockrpc.GuestRolledBack && len(r.Rejected) == 0: // somebody had it tried again
			p.poke()
		}
		if r != nil {
			p.refreshed(r)
		}
		reached = true
		if err := pausing(ctx, pause); err != nil {
			return reached, err
		}
	}
	return reached, errors.New("the guest ended the watch")
}

// OnlyCID lets one guest ring, from any port: what a ring brings about is no
// secret's way.
func OnlyCID(cid uint32) func(vsockrpc.Peer) error {
	return func(peer vsockrpc.Peer) error {
		if peer.Kind == vsockrpc.PeerVsock && peer.CID == cid {
			return nil
		}
		return fmt.Errorf("%w: this provider is for CID %d", vsockrpc.ErrRefused, cid)
	}
}

// LocalRoot lets root on this machine ring, and whoever runs the provider.
func LocalRoot(peer vsockrpc.Peer) error { return localUser(peer, os.Geteuid()) }

// May lets ring whom the socket belongs to, the VMM's user, and root.
func (m *MuxListener) May(peer vsockrpc.Peer) error {
	m.looking.Lock()
	uid := m.owner.uid
	m.looking.Unlock()
	return localUser(peer, uid)
}

func localUser(peer vsockrpc.Peer, uid int) error {
	if peer.Local() && (peer.UID == 0 || int64(peer.UID) == int64(uid)) {
		return nil
	}
	return fmt.Errorf("%w: this provider's guest is behind user %d", vsockrpc.ErrRefused, uid)
}
