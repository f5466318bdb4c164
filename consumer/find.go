package consumer

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"

	systemd "github.com/coreos/go-systemd/v22/dbus"
)

// Find returns the units that load any of names, sorted by name: services,
// sockets, mounts and swaps that systemd has loaded, whether they are active or
// not. Loads has only what is among names.
func (c *Conn) Find(ctx context.Context, names []string) ([]Unit, error) {
	return c.find(ctx, names, func(ctx context.Context, u systemd.UnitStatus) (settings, error) { return c.settings(ctx, u.Name) })
}

// find is Find with a way to get the settings of a listed unit.
func (c *Conn) find(ctx context.Context, names []string, get func(context.Context, systemd.UnitStatus) (settings, error)) ([]Unit, error) {
	// Nothing else has credentials: what has an ExecContext, and is no slice.
	list, err := c.manager.ListUnitsByPatternsContext(ctx, []string{}, []string{"*.service", "*.socket", "*.mount", "*.swap"})
	if err != nil {
		return nil, c.failure(ctx, "listing units", err)
	}
	// What has no file has no settings.
	list = slices.DeleteFunc(list, func(u systemd.UnitStatus) bool { return u.LoadState == "not-found" })

	found := make([]Unit, len(list))
	err = each(len(list), func(i int) error {
		s, err := get(ctx, list[i])
		if err != nil {
			// It may be gone by now.
			if isAnswer(err) {
				return nil
			}
			return err
		}
		loads := s.loads(names, c.cfg)
		if len(loads) == 0 {
			return nil
		}
		found[i], err = c.describe(ctx, list[i], loads)
		if isAnswer(err) {
			return nil
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	found = slices.DeleteFunc(found, func(u Unit) bool { return u.Name == "" })
	slices.SortFunc(found, func(a, b Unit) int { return cmp.Compare(a.Name, b.Name) })
	return found, nil
}

// Unit returns one unit of any kind, and which of names it loads, which may be
// none. systemd loads it if it has not yet; a unit that has no file is no
// error, its LoadState says so.
func (c *Conn) Unit(ctx context.Context, name string, names []string) (Unit, error) {
	u, err := c.state(ctx, name)
	if err != nil {
		return Unit{}, err
	}
	s, err := c.settings(ctx, u.Name)
	if err != nil {
		return Unit{}, err
	}
	return c.describe(ctx, u, s.loads(names, c.cfg))
}

// Starting tells what a unit is about to do, when it asks for a credential.
func (c *Conn) Starting(ctx context.Context, unit string) (Start, error) {
	u, err := c.state(ctx, unit)
	if err != nil {
		return Start{}, err
	}
	s, err := c.settings(ctx, u.Name)
	if err != nil {
		return Start{}, err
	}
	v, err := c.get(ctx, unitPath(u.Name), property{ifaceUnit, "InvocationID"})
	if err != nil {
		return Start{}, err
	}
	return Start{
		InvocationID: v.id("InvocationID"),
		Job:          u.JobId,
		JobType:      u.JobType,
		ActiveState:  u.ActiveState,
		SubState:     u.SubState,
		SocketNames:  s.socketNames(c.cfg),
	}, nil
}

// Own returns the unit that this process runs in, the type of the job that is
// pending for it ("" if there is none), and whether what it has put into the fd
// store outlives its stop: FileDescriptorStorePreserve=yes, from systemd 254.
func (c *Conn) Own(ctx context.Context) (unit, jobType string, preserve bool, err error) {
	unit, err = c.manager.GetUnitNameByPID(ctx, uint32(os.Getpid())) //nolint:gosec // a pid is positive
	if err != nil {
		return "", "", false, c.failure(ctx, "asking systemd for the own unit", err)
	}
	u, err := c.state(ctx, unit)
	if err != nil {
		return "", "", false, err
	}
	if path.Ext(u.Name) == ".service" {
		v, err := c.get(ctx, unitPath(u.Name), property{ifaceService, "FileDescriptorStorePreserve"})
		if err != nil {
			return "", "", false, err
		}
		preserve = v.text("FileDescriptorStorePreserve") == "yes"
	}
	return u.Name, u.JobType, preserve, nil
}

// state returns a unit's state and its pending job.
func (c *Conn) state(ctx context.Context, unit string) (systemd.UnitStatus, error) {
	list, err := c.manager.ListUnitsByNamesContext(ctx, []string{unit})
	switch {
	case err != nil:
		return systemd.UnitStatus{}, c.failure(ctx, fmt.Sprintf("looking up unit %q", unit), err)
	case len(list) != 1:
		return systemd.UnitStatus{}, fmt.Errorf("looking up unit %q: %w", unit, errNoUnit)
	}
	return list[0], nil
}

var errNoUnit = errors.New("systemd does not know it")

// execInterface returns the D-Bus interface that has the settings of what a
// unit executes, "" for units that execute nothing.
func execInterface(unit string) string {
	switch path.Ext(unit) {
	case ".service":
		return ifaceService
	case ".socket":
		return "org.freedesktop.systemd1.Socket"
	case ".mount":
		return "org.freedesktop.systemd1.Mount"
	case ".swap":
		return "org.freedesktop.systemd1.Swap"
	default:
		return ""
	}
}

// settings asks what a unit says about credentials.
func (c *Conn) settings(ctx context.Context, unit string) (settings, error) {
	iface := execInterface(unit)
	if iface == "" {
		return settings{}, nil
	}
	v, err := c.get(ctx, unitPath(unit),
		property{iface, "LoadCredential"},
		property{iface, "LoadCredentialEncrypted"},
		property{iface, "ImportCredential"},   // from systemd 254
		property{iface, "ImportCredentialEx"}, // from systemd 257
		property{iface, "EnvironmentFiles"},
	)
	if err != nil {
		return settings{}, fmt.Errorf("reading the settings of %q: %w", unit, err)
	}
	var (
		s         settings
		encrypted []loadCredential
		globs     []string
		files     []struct {
			Path     string
			Optional bool
		}
	)
	err = errors.Join(
		v.list("LoadCredential", &s.load),
		v.list("LoadCredentialEncrypted", &encrypted),
		v.list("ImportCredential", &globs),
		v.list("ImportCredentialEx", &s.imports),
		v.list("EnvironmentFiles", &files),
	)
	if err != nil {
		return settings{}, fmt.Errorf("reading the settings of %q: %w", unit, err)
	}
	s.load = append(s.load, encrypted...)
	if _, ok := v["ImportCredentialEx"]; !ok {
		for _, g := range globs {
			s.imports = append(s.imports, importCredential{Glob: g})
		}
	}
	for _, f := range files {
		s.environments = append(s.environments, f.Path)
	}
	return s, nil
}

// describeTries is how often a unit is asked for that is started anew meanwhile.
const describeTries = 3

// describe asks for the rest of a unit, and for its state anew: all of it is of
// one run. Of one that was started since it was listed, or is right now, part
// would be of the run before.
func (c *Conn) describe(ctx context.Context, u systemd.UnitStatus, loads []Load) (Unit, error) {
	for range describeTries - 1 {
		unit, err := c.describeOnce(ctx, u, loads, property{ifaceUnit, "InvocationID"})
		if !errors.Is(err, errMoved) {
			return unit, err
		}
	}
	return c.describeOnce(ctx, u, loads)
}

// describeOnce is describe, once, and asks for something more in the end.
func (c *Conn) describeOnce(ctx context.Context, u systemd.UnitStatus, loads []Load, last ...property) (Unit, error) {
	wanted := []property{
		{ifaceUnit, "InvocationID"},
		{ifaceUnit, "ActiveState"},
		{ifaceUnit, "SubState"},
		{ifaceUnit, "CanReload"},
		{ifaceUnit, "RefuseManualStop"},
		{ifaceUnit, "InactiveExitTimestampMonotonic"},
	}
	isService := execInterface(u.Name) == ifaceService
	if isService {
		wanted = append(wanted,
			property{ifaceService, "Type"},
			property{ifaceService, "ExecMainStartTimestampMonotonic"},
			property{ifaceService, "RefreshOnReload"}, // from systemd 260
		)
	}
	v, err := c.get(ctx, unitPath(u.Name), append(wanted, last...)...)
	if err != nil {
		return Unit{}, fmt.Errorf("reading the state of %q: %w", u.Name, err)
	}
	var refreshes []string
	if err := v.list("RefreshOnReload", &refreshes); err != nil {
		return Unit{}, fmt.Errorf("reading the state of %q: %w", u.Name, err)
	}
	unit := Unit{
		Name:             u.Name,
		LoadState:        u.LoadState,
		ActiveState:      v.text("ActiveState"),
		SubState:         v.text("SubState"),
		Loads:            loads,
		InvocationID:     v.id("InvocationID"),
		Type:             v.text("Type"),
		CanReload:        v.flag("CanReload"),
		RefreshOnReload:  slices.Contains(refreshes, "credentials"),
		RefuseManualStop: v.flag("RefuseManualStop"),
	}
	if unit.ActiveState == "inactive" || unit.ActiveState == "failed" {
		return unit, nil
	}
	unit.LoadedUSec = v.number("InactiveExitTimestampMonotonic")
	if isService {
		main := v.number("ExecMainStartTimestampMonotonic")
		if unit.ActiveState == "activating" {
			// Until its main process is there, that is the time of the one before,
			// and what is there is of this start.
			main = max(main, unit.LoadedUSec)
		}
		unit.LoadedUSec = main
	}
	unit.StartedUSec = unit.LoadedUSec
	if !unit.RefreshOnReload {
		return unit, nil
	}
	v, err = c.get(ctx, unitPath(u.Name), append([]property{
		{ifaceUnit, "StateChangeTimestampMonotonic"},
		{ifaceUnit, "ActiveEnterTimestampMonotonic"},
		{ifaceService, "ReloadResult"},
		{ifaceService, "ExecReload"},
	}, last...)...)
	if err == nil && len(last) > 0 && v.id("InvocationID") != unit.InvocationID {
		err = errMoved
	}
	if err != nil {
		return Unit{}, fmt.Errorf("reading the state of %q: %w", u.Name, err)
	}
	unit.ReloadTells = unit.Type == "notify-reload" || v.length("ExecReload") > 0
	// The last change of its state is the end of a reload only if it came after
	// the end of its start, and it loaded something only if that reload
	// succeeded: a failed one leaves the old credentials where they are.
	changed := v.number("StateChangeTimestampMonotonic")
	if unit.ActiveState == "active" && changed > v.number("ActiveEnterTimestampMonotonic") && v.text("ReloadResult") == "success" {
		unit.LoadedUSec = changed
	}
	return unit, nil
}
