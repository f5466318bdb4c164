package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/journal"

	"github.com/guestagent/guestagent/consumer"
	"github.com/guestagent/guestagent/credsocket"
	"github.com/guestagent/guestagent/credstore"
)

const (
	// maxLoads bounds the units that are remembered for what they were handed.
	maxLoads = 4096
	// maxNote bounds the note of them, in bytes.
	maxNote = 4 << 20
	// pinCheck is how often it is looked whether a start is over whose values are
	// kept open.
	pinCheck = 5 * time.Second
	// busIdle is how long the connection to PID 1 is kept between requests.
	busIdle = 5 * time.Second
	// busRetry is how long a request waits where PID 1 does not answer, as it
	// does while it executes itself anew.
	busRetry = time.Second
)

// loads is what units were handed over the credentials socket, by unit. It is
// kept beside the store's state, and holds no values.
type loads map[string]unitLoads

// unitLoads is what one run of a unit was handed.
type unitLoads struct {
	InvocationID string `json:"invocationId"`
	// Reload is the job of the reload that loaded it; 0 where a start did.
	Reload uint32 `json:"reload,omitempty"`
	// Generation is the one that was in force when the start asked first: all
	// it loads is of that.
	Generation uint64          `json:"generation"`
	At         time.Time       `json:"at"`
	Names      map[string]load `json:"names"`
}

// A load is one value that was handed out. Its generation is that of the set
// which brought the bytes.
type load struct {
	Generation uint64 `json:"generation"`
	Revision   string `json:"revision"`
	// USec is when, on CLOCK_MONOTONIC in microseconds; Reload whether it was a
	// reload that asked. The unit has it once that reload has succeeded.
	USec   uint64 `json:"monotonicUSec"`
	Reload bool   `json:"reload,omitempty"`
}

// of returns what the run of that invocation was handed as name.
func (u unitLoads) of(invocation, name string) (load, bool) {
	if invocation == "" || u.InvocationID != invocation {
		return load{}, false
	}
	l, ok := u.Names[name]
	return l, ok
}

// readLoads reads what is remembered. What does not make sense is forgotten:
// then units count as stale that may not be.
func readLoads(tx *credstore.Tx) loads {
	b, err := tx.Note(credstore.NoteLoads)
	l := loads{}
	if err != nil || json.Unmarshal(b, &l) != nil {
		return loads{}
	}
	return l
}

// mayLoad says why a unit may not load a name from the credentials socket; nil
// where it may.
func (c *Config) mayLoad(unit, name string) error {
	if c.Policy.Deny {
		return errors.New("policy in the guest's configuration is at fault, and so nobody is given anything; guestagent check-config tells where")
	}
	restricted := false
	for pattern, units := range c.Policy.Load {
		prefix, glob := strings.CutSuffix(pattern, "*")
		if name != pattern && (!glob || !strings.HasPrefix(name, prefix)) {
			continue
		}
		if matchesUnit(unit, units) {
			return nil
		}
		restricted = true
	}
	if restricted {
		return errors.New("policy.load in the guest's configuration does not let this unit load it; name the unit there, or take the load out of it")
	}
	return nil
}

// A handout hands values to the units that ask on the credentials socket. One
// start of a unit gets all its names from one generation.
type handout struct {
	a      *Agent
	cfg    Config
	log    *slog.Logger
	server *credsocket.Server

	// hold keeps the agent from ending when idle, until release is called.
	hold func() (release func())
	// tell says that the units that wait may be others now.
	tell func()

	// turn guards what follows: of who decides, and of who lets go of pins.
	turn  sync.Mutex
	pins  map[string]*pin
	asked map[credsocket.Request]string // who was said to wait, with the invocation
	timer *time.Timer                   // runs while there are pins
	stay  func()                        // releases what hold holds while there are pins
	bus   sharedBus

	mu     sync.Mutex
	loads  loads
	held   map[credsocket.Request]bool // who was told to wait, and was not given anything since
	dirty  bool
	saver  sync.Mutex // one goroutine writes at a time
	saving sync.WaitGroup
}

// A pin is what one start of a unit loads: open files, which stay what they
// are whatever is put in force meanwhile.
type pin struct {
	invocation string
	reload     uint32
	generation uint64
	values     map[string]pinned
	over       bool // the start was over when it was last looked at
}

type pinned struct {
	file  *os.File
	entry credstore.Entry
}

func (p *pin) close() {
	for _, v := range p.values {
		_ = v.file.Close()
	}
}

func (a *Agent) newHandout(cfg Config, log *slog.Logger) *handout {
	h := &handout{
		a: a, cfg: cfg, log: log, pins: map[string]*pin{}, asked: map[credsocket.Request]string{}, held: map[credsocket.Request]bool{},
		hold: func() func() { return func() {} }, tell: func() {},
	}
	h.bus.dial = a.pid1
	h.server = &credsocket.Server{Decide: h.decide, Wait: cfg.Socket.Wait, Log: log}
	h.loads = loads{}
	tx, err := a.store().View()
	if err != nil {
		// Nobody is told anything as long as that is so, and all of them wait.
		log.Error("units that load credentials wait, since the store cannot be read", slog.String("error", err.Error()))
		return h
	}
	defer tx.Close()
	h.loads = readLoads(tx)
	return h
}

// decide says what becomes of a request: see [credsocket.Server].
func (h *handout) decide(ctx context.Context, r credsocket.Request) credsocket.Decision {
	d := h.decision(ctx, r)
	wait := d.Value == nil && d.Refuse == nil
	h.mu.Lock()
	was := h.held[r]
	if wait {
		if !was && len(h.held) >= maxLoads { // units that were stopped while they waited
			there := map[credsocket.Request]bool{}
			for _, w := range h.server.Waiting() {
				there[w.Request] = h.held[w.Request]
			}
			h.held = there
		}
		h.held[r] = true
	} else {
		delete(h.held, r)
	}
	h.mu.Unlock()
	if wait != was {
		h.tell()
	}
	return d
}

// waiting returns the requests that wait, oldest first. One that is not decided on
// is none: most are given what they ask for at once.
func (h *handout) waiting() []credsocket.Waiting {
	all := h.server.Waiting()
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.DeleteFunc(all, func(w credsocket.Waiting) bool { return !h.held[w.Request] })
}

func (h *handout) decision(ctx context.Context, r credsocket.Request) credsocket.Decision {
	refuse := func(err error) credsocket.Decision { return credsocket.Decision{Refuse: err} }
	h.turn.Lock()
	defer h.turn.Unlock()
	if err := h.cfg.mayLoad(r.Unit, r.Name); err != nil {
		return refuse(err)
	}
	start, err := h.starting(ctx, r.Unit)
	if err != nil {
		return h.later(ctx, r, fmt.Errorf("asking systemd about the unit: %w", err))
	}
	if start.InvocationID == "" {
		return refuse(errors.New("systemd has not started such a unit"))
	}
	reload := uint32(0)
	if start.JobType == "reload" {
		reload = start.Job
	}
	p := h.pins[r.Unit]
	if p == nil || p.invocation != start.InvocationID || reload != 0 && p.reload != reload {
		h.dropLocked(r.Unit)
		var missing string
		p, missing, err = h.pin(r, start, reload)
		if errors.Is(err, errMixed) {
			return refuse(err)
		}
		if err != nil {
			return h.later(ctx, r, err)
		}
		if p == nil {
			h.waits(r, start.InvocationID, missing)
			return credsocket.Decision{}
		}
		h.keepLocked(r.Unit, p)
	}
	p.over = false
	v, ok := p.values[r.Name]
	if !ok {
		// Not among what systemd says the unit loads: its definition changed
		// after it was started.
		return refuse(errors.New("the unit's definition changed while it started; start it again"))
	}
	file, err := dup(v.file)
	if err != nil {
		return refuse(err)
	}
	return credsocket.Decision{Value: file, Size: v.entry.Size, Given: func() { h.given(r, p, v.entry) }}
}

// later has a request wait for what does not work now, and decided on anew.
func (h *handout) later(ctx context.Context, r credsocket.Request, err error) credsocket.Decision {
	if ctx.Err() == nil {
		h.log.Warn("a unit that loads a credential has to wait", slog.String("unit", r.Unit), slog.String("credential", r.Name), slog.String("error", err.Error()))
		time.AfterFunc(busRetry, h.server.Retry)
	}
	return credsocket.Decision{}
}

// errMixed is matched by the refusal of a start that would get values of two
// generations.
var errMixed = errors.New("start the unit again")

// pin opens all that the unit loads over the socket, in one look at the store.
// A nil pin without an error means that something has not arrived yet.
func (h *handout) pin(r credsocket.Request, start consumer.Start, reload uint32) (_ *pin, missing string, err error) {
	tx, err := h.a.store().View()
	if err != nil {
		return nil, "", err
	}
	defer tx.Close()
	p := &pin{invocation: start.InvocationID, reload: reload, generation: tx.Generation(), values: map[string]pinned{}}
	defer func() {
		if err != nil || missing != "" {
			p.close()
		}
	}()
	h.mu.Lock()
	before, known := h.loads[r.Unit]
	h.mu.Unlock()
	// An agent that was restarted in the middle of a start does not have the
	// files any more that the start began with.
	known = known && before.InvocationID == start.InvocationID && before.Reload == reload && inProgress(start)
	for _, name := range append([]string{r.Name}, start.SocketNames...) {
		if _, ok := p.values[name]; ok || name != r.Name && h.cfg.mayLoad(r.Unit, name) != nil {
			continue
		}
		file, e, err := tx.Open(name)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, name, nil
		}
		if err != nil {
			return nil, "", err
		}
		p.values[name] = pinned{file, e}
		if known && e.Generation > before.Generation {
			return nil, "", fmt.Errorf("%s changed in the middle of this start, which has values of generation %d already; %w", name, before.Generation, errMixed)
		}
	}
	if known {
		p.generation = before.Generation
	}
	return p, "", nil
}

// inProgress reports whether a unit is being started or reloaded.
func inProgress(s consumer.Start) bool {
	if strings.HasPrefix(s.SubState, "auto-restart") {
		return false // nothing runs until it is started anew
	}
	return s.Job != 0 || s.ActiveState == "activating" || s.ActiveState == "reloading" || s.ActiveState == "refreshing"
}

// waits says once, for each start, that a unit waits, and for what.
func (h *handout) waits(r credsocket.Request, invocation, missing string) {
	if h.asked[r] == invocation {
		return
	}
	if len(h.asked) >= maxLoads {
		clear(h.asked)
	}
	h.asked[r] = invocation
	h.log.Info("a unit waits for a credential", slog.String("unit", r.Unit), slog.String("credential", missing))
}

// keepLocked keeps a pin, and notes it before anything is handed out: an agent
// that comes after this one in the middle of the start has to know which
// generation it began with.
func (h *handout) keepLocked(unit string, p *pin) {
	h.pins[unit] = p
	if h.stay == nil {
		h.stay = h.hold()
		h.timer = time.AfterFunc(pinCheck, h.unpin)
	}
	h.note(unit, p, func(unitLoads) {})
	h.save()
}

func (h *handout) dropLocked(unit string) {
	if p := h.pins[unit]; p != nil {
		p.close()
		delete(h.pins, unit)
	}
}

// unpin lets go of the values of starts that are over. A service of Type=simple
// counts as started a moment before it asks: it has until the next look.
func (h *handout) unpin() {
	h.turn.Lock()
	defer h.turn.Unlock()
	if h.stay == nil {
		return // closed
	}
	ctx, cancel := context.WithTimeout(context.Background(), pid1Timeout)
	defer cancel()
	for unit, p := range h.pins {
		start, err := h.starting(ctx, unit)
		switch {
		case err != nil:
		case start.InvocationID == p.invocation && inProgress(start):
			p.over = false
		case p.over:
			h.dropLocked(unit)
		default:
			p.over = true
		}
	}
	if len(h.pins) > 0 {
		h.timer.Reset(pinCheck)
		return
	}
	h.stay()
	h.stay = nil
}

func (h *handout) starting(ctx context.Context, unit string) (consumer.Start, error) {
	bus, err := h.bus.get(ctx)
	if err != nil {
		return consumer.Start{}, err
	}
	s, err := bus.Starting(ctx, unit)
	h.bus.put(err != nil)
	return s, err
}

// given records that a value was handed out, for the journal and for telling
// who is stale. A value that was handed out and not recorded makes its unit
// count as stale.
func (h *handout) given(r credsocket.Request, p *pin, e credstore.Entry) {
	h.note(r.Unit, p, func(u unitLoads) {
		u.Names[r.Name] = load{Generation: e.Generation, Revision: e.Revision, USec: credstore.MonotonicUSec(), Reload: p.reload != 0}
	})
	// Neither may hold up other units: the journal may be stuck.
	h.saving.Go(h.save)
	h.saving.Go(func() { h.a.audit(h.log, r, e) })
}

// note remembers that a start loads what is in force in p's generation, and what
// add adds to that.
func (h *handout) note(unit string, p *pin, add func(unitLoads)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	u := h.loads[unit]
	if u.InvocationID != p.invocation || u.Reload != p.reload {
		names := map[string]load{}
		if p.reload != 0 && u.InvocationID == p.invocation {
			maps.Copy(names, u.Names) // what a reload does not load it keeps
		}
		u = unitLoads{InvocationID: p.invocation, Reload: p.reload, Names: names}
	}
	u.Generation, u.At = p.generation, time.Now().UTC()
	add(u)
	h.loads[unit] = u
	if len(h.loads) > maxLoads {
		h.forgetLocked(1)
	}
	h.dirty = true
}

// forgetLocked forgets the n units that loaded something the longest ago.
func (h *handout) forgetLocked(n int) {
	oldest := slices.SortedFunc(maps.Keys(h.loads), func(x, y string) int { return h.loads[x].At.Compare(h.loads[y].At) })
	for _, unit := range oldest[:min(n, len(oldest))] {
		delete(h.loads, unit)
	}
}

// save writes what is remembered, if that has changed since it was written.
// When it returns, it is written, or the journal says why not.
func (h *handout) save() {
	h.saver.Lock()
	defer h.saver.Unlock()
	h.mu.Lock()
	dirty := h.dirty
	h.dirty = false
	b, err := json.Marshal(h.loads)
	for err == nil && len(b) > maxNote {
		h.forgetLocked(1 + len(h.loads)/4)
		b, err = json.Marshal(h.loads)
	}
	h.mu.Unlock()
	if !dirty {
		return
	}
	if err == nil {
		var tx *credstore.Tx
		if tx, err = h.a.store().Begin(); err == nil {
			err = tx.SetNote(credstore.NoteLoads, b)
			tx.Close()
		}
	}
	if err != nil {
		h.mu.Lock()
		h.dirty = true
		h.mu.Unlock()
		h.log.Error("recording who was handed what failed; units may count as stale that are not", slog.String("error", err.Error()))
	}
}

// close lets go of everything. It must not be called while the server serves.
func (h *handout) close() {
	h.turn.Lock()
	for unit := range h.pins {
		h.dropLocked(unit)
	}
	if h.stay != nil {
		h.timer.Stop()
		h.stay()
		h.stay = nil
	}
	h.turn.Unlock()
	h.bus.close()
	h.saving.Wait()
	h.save()
}

// audit leaves a line in the journal, with fields to search for, that a unit
// was handed a credential. It never has the value.
func (a *Agent) audit(log *slog.Logger, r credsocket.Request, e credstore.Entry) {
	message := fmt.Sprintf("%s loaded credential %s", r.Unit, r.Name)
	vars := map[string]string{
		"UNIT": r.Unit, "CREDENTIAL": r.Name, "REVISION": e.Revision, "GENERATION": strconv.FormatUint(e.Generation, 10),
		"SYSLOG_IDENTIFIER": "guestagent",
	}
	send := journal.Send
	if a.sendJournal != nil {
		send = a.sendJournal
	}
	if err := send(message, journal.PriInfo, vars); err != nil {
		log.Info("a unit loaded a credential", slog.String("unit", r.Unit), slog.String("credential", r.Name),
			slog.String("revision", e.Revision), slog.Uint64("generation", e.Generation))
	}
}

// A sharedBus is a connection to PID 1 that is kept for a while.
type sharedBus struct {
	dial func(context.Context) (systemd, error)

	mu    sync.Mutex
	conn  systemd // nil: none
	inUse bool
	timer *time.Timer
}

// get returns the connection, for one user at a time, until put.
func (b *sharedBus) get(ctx context.Context) (systemd, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.conn == nil {
		conn, err := b.dial(ctx)
		if err != nil {
			return nil, err
		}
		b.conn = conn
	}
	if b.timer != nil {
		b.timer.Stop()
	}
	b.inUse = true
	return b.conn, nil
}

// put gives the connection back, which may be broken.
func (b *sharedBus) put(broken bool) {
	b.mu.Lock()
	b.inUse = false
	b.timer = time.AfterFunc(busIdle, b.close)
	b.mu.Unlock()
	if broken {
		b.close()
	}
}

func (b *sharedBus) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.conn != nil && !b.inUse {
		b.conn.Close()
		b.conn = nil
	}
}
