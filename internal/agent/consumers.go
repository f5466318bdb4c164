package agent

import (
	"cmp"
	"context"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/guestagent/guestagent/consumer"
	"github.com/guestagent/guestagent/credstore"
	"github.com/guestagent/guestagent/internal/credential"
	"github.com/guestagent/guestagent/internal/secret"
	"github.com/guestagent/guestagent/vsockrpc"
)

// listTimeout bounds the wait for PID 1 while a list is made.
const listTimeout = 20 * time.Second

// A view is what the store says at one moment, for telling what consumers
// have. It holds no values.
type view struct {
	entries  map[string]credstore.Entry
	previous map[string]credstore.Entry // what the last set replaced
	// removedAt is when a name went out of force, CLOCK_MONOTONIC in
	// microseconds, for names that somebody just removed.
	removedAt map[string]uint64
	loads     loads
	// compare tells by reading what a unit was given under that name; false
	// where it cannot be read.
	compare func(unit, as, name string) (loaded string, ok bool)
}

// newView reads the store. Removed are names that the last set took away. The
// view may not be used once tx is closed where consumers are compared.
func (a *Agent) newView(tx *credstore.Tx, cfg Config, removed []string) *view {
	v := &view{
		entries: map[string]credstore.Entry{}, previous: map[string]credstore.Entry{}, removedAt: map[string]uint64{},
		loads: readLoads(tx),
	}
	for _, e := range tx.Entries() {
		v.entries[e.Name] = e
		if p, ok := tx.PreviousEntry(e.Name); ok {
			v.previous[e.Name] = p
		}
	}
	for _, name := range removed {
		v.removedAt[name] = tx.ChangedUSec()
	}
	if cfg.Consumers.Compare {
		v.compare = func(unit, as, name string) (string, bool) { return a.compareLoaded(tx, unit, as, name) }
	}
	return v
}

// loaded says what a unit has of a name that it loads: the state of it, as in
// vsockrpc, and the revision.
func (v *view) loaded(u consumer.Unit, l consumer.Load) (loaded, revision string) {
	inForce, there := v.entries[l.Name]
	previous, kept := v.previous[l.Name]
	if !running(u) || strings.HasSuffix(u.Name, ".socket") {
		return vsockrpc.LoadedNone, ""
	}
	which := func(had, now, before uint64) string {
		switch {
		case there && (had == now):
			return vsockrpc.LoadedInForce
		case kept && had == before:
			return vsockrpc.LoadedPrevious
		}
		return vsockrpc.LoadedUnknown
	}
	switch {
	case l.Way == consumer.WaySocket:
		// Who was handed what is known.
		load, ok := v.loads[u.Name].of(u.InvocationID, l.As)
		switch {
		case ok && load.Reload && u.LoadedUSec < load.USec:
			loaded = vsockrpc.LoadedUnknown // the reload goes on, or failed and changed nothing
		case ok:
			loaded = which(load.Generation, inForce.Generation, previous.Generation)
		case u.ActiveState == "activating":
			return vsockrpc.LoadedNone, "" // it has not asked yet, or waits
		case v.loads[u.Name].Names[l.As].USec > u.LoadedUSec:
			return vsockrpc.LoadedNone, "" // it was started anew since systemd was asked
		default:
			loaded = vsockrpc.LoadedUnknown
		}
	case !strings.HasSuffix(u.Name, ".service"):
		return vsockrpc.LoadedUnknown, "" // what it was given went with the process that used it
	case inForce.State == credstore.StateShadowed && (l.Way == consumer.WayFile || l.Way == consumer.WayImport):
		return vsockrpc.LoadedUnknown, "" // it has the other file's
	default:
		if v.compare != nil && l.As != "" {
			if loaded, ok := v.compare(u.Name, l.As, l.Name); ok {
				return loaded, v.revision(loaded, l.Name)
			}
		}
		// By the clock: who began after the value was in force has it.
		switch at := v.changedAt(l.Name); {
		case !there:
			loaded = vsockrpc.LoadedUnknown
		case loadedUSec(u, l) >= at:
			loaded = vsockrpc.LoadedInForce
		case kept && loadedUSec(u, l) >= previous.InstalledUSec:
			loaded = vsockrpc.LoadedPrevious
		default:
			loaded = vsockrpc.LoadedUnknown
		}
	}
	return loaded, v.revision(loaded, l.Name)
}

// loadedUSec is when the unit loaded that, on CLOCK_MONOTONIC in microseconds.
func loadedUSec(u consumer.Unit, l consumer.Load) uint64 {
	if l.Way == consumer.WayEnvironment {
		return u.StartedUSec
	}
	return u.LoadedUSec
}

// missing reports whether whoever loads the name over the socket waits for it.
func (v *view) missing(name string) bool {
	e, there := v.entries[name]
	return !there || e.State == credstore.StateMissing || e.State == credstore.StateForeign
}

func (v *view) revision(loaded, name string) string {
	switch loaded {
	case vsockrpc.LoadedInForce:
		return v.entries[name].Revision
	case vsockrpc.LoadedPrevious:
		return v.previous[name].Revision
	}
	return ""
}

// changedAt is when what is in force of a name came to be, or the name went.
func (v *view) changedAt(name string) uint64 {
	return max(v.entries[name].InstalledUSec, v.removedAt[name])
}

// staleLoad reports whether the unit runs with another value of the name than
// the one in force. What nobody can tell counts as stale, but where systemd
// finds another file than the store's, since no refresh would mend that, and for
// units other than services. systemd takes their settings and gives them
// nothing: a socket's commands by none up to 262, mount(8) by none up to 257.
func (v *view) staleLoad(u consumer.Unit, l consumer.Load) bool {
	if !running(u) {
		return false
	}
	if !strings.HasSuffix(u.Name, ".service") {
		loaded, _ := v.loaded(u, l)
		return loaded == vsockrpc.LoadedPrevious
	}
	e, there := v.entries[l.Name]
	if !there {
		at, gone := v.removedAt[l.Name]
		return gone && (l.Way == consumer.WaySocket || loadedUSec(u, l) < at)
	}
	if e.State == credstore.StateShadowed && (l.Way == consumer.WayFile || l.Way == consumer.WayImport) {
		return false
	}
	loaded, _ := v.loaded(u, l)
	return loaded == vsockrpc.LoadedPrevious || loaded == vsockrpc.LoadedUnknown
}

// consumers adds to each entry who loads it.
func (a *Agent) consumers(ctx context.Context, cfg Config, entries []vsockrpc.Entry) error {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	bus, err := a.pid1(ctx)
	if err != nil {
		return err
	}
	defer bus.Close()
	own, err := ownUnit(ctx, bus)
	if err != nil {
		return err
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name
	}
	units, err := bus.Find(ctx, names)
	if err != nil {
		return err
	}
	return a.addConsumers(cfg, entries, units, own)
}

// addConsumers adds to each entry which of the units load it. Own is the unit
// that the agent runs in.
func (a *Agent) addConsumers(cfg Config, entries []vsockrpc.Entry, units []consumer.Unit, own string) error {
	// Only now: nothing is held while PID 1 is waited for.
	tx, err := a.store().View()
	if err != nil {
		return err
	}
	defer tx.Close()
	v := a.newView(tx, cfg, nil)
	r := refresh{cfg: cfg, mode: vsockrpc.RefreshAuto}
	for i := range entries {
		e := &entries[i]
		for _, u := range units {
			for _, l := range u.Loads {
				if l.Name != e.Name {
					continue
				}
				action, why := r.action(u, r.mode, own)
				c := vsockrpc.Consumer{
					Unit: u.Name, ActiveState: u.ActiveState, As: l.As, Way: string(l.Way), Stale: v.staleLoad(u, l),
					Refresh: wireAction(action), Detail: why,
				}
				c.Loaded, c.Revision = v.loaded(u, l)
				if e.State == string(credstore.StateShadowed) && (l.Way == consumer.WayFile || l.Way == consumer.WayImport) {
					c.Detail = cmp.Or(c.Detail, "it loads "+e.Path+", which systemd finds first")
				}
				e.Consumers = append(e.Consumers, c)
			}
		}
		slices.SortFunc(e.Consumers, func(x, y vsockrpc.Consumer) int {
			return cmp.Or(strings.Compare(x.Unit, y.Unit), strings.Compare(x.As, y.As))
		})
	}
	return nil
}

func wireAction(a consumer.Action) string {
	switch a {
	case consumer.ActionReload:
		return vsockrpc.ActionReload
	case consumer.ActionRestart, consumer.ActionTryRestart:
		return vsockrpc.ActionRestart
	}
	return vsockrpc.ActionNone
}

// compareLoaded reads what the unit was given, and says whose bytes they are.
// A sandboxed service sees other units' credentials only where they are bound
// to another folder, see pathLoaded.
func (a *Agent) compareLoaded(tx *credstore.Tx, unit, as, name string) (loaded string, ok bool) {
	file := filepath.Join(a.path(pathLoaded), unit, as)
	f, err := os.OpenFile(file, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return "", false
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() || info.Size() > credential.MaxSize {
		return "", false
	}
	b := make([]byte, info.Size())
	value := secret.New(b)
	defer value.Wipe()
	if _, err := io.ReadFull(f, b); err != nil {
		return "", false
	}
	switch {
	case tx.Holds(name, value):
		return vsockrpc.LoadedInForce, true
	case tx.HoldsPrevious(name, value):
		return vsockrpc.LoadedPrevious, true
	}
	return vsockrpc.LoadedUnknown, true
}
