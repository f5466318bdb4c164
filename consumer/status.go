package consumer

import (
	"context"
	"fmt"
	"path"

	"github.com/godbus/dbus/v5"
)

// A Status is how a unit is doing. What a kind of unit does not have is zero.
type Status struct {
	ActiveState string
	SubState    string
	Result      string // success, exit-code, signal, timeout, ...
	Type        string // of a service: simple, oneshot, ...

	// ExecMainCode and ExecMainStatus say how a service's main process ended:
	// si_code and si_status of waitid(2). They are 0 while it runs.
	ExecMainCode   int32
	ExecMainStatus int32

	NRestarts    uint32 // how often systemd restarted the service by itself since it was started
	InvocationID string // as in [Unit]
}

// The values of ExecMainCode: CLD_EXITED, CLD_KILLED and CLD_DUMPED.
const (
	childExited = 1
	childKilled = 2
	childDumped = 3
)

// String returns the status as one line, such as "failed (result exit-code,
// exit status 1)". It never has a unit's own words in it: neither its status
// text nor its log.
func (s Status) String() string {
	detail := s.SubState
	if s.Result != "" && s.Result != "success" {
		result := "result " + s.Result
		switch s.ExecMainCode {
		case childExited:
			result += fmt.Sprintf(", exit status %d", s.ExecMainStatus)
			if s.ExecMainStatus == 243 { // EXIT_CREDENTIALS of systemd.exec(5)
				result += "/CREDENTIALS"
			}
		case childKilled:
			result += fmt.Sprintf(", killed by signal %d", s.ExecMainStatus)
		case childDumped:
			result += fmt.Sprintf(", dumped core by signal %d", s.ExecMainStatus)
		}
		if detail == s.ActiveState || detail == "" {
			detail = result
		} else {
			detail += ", " + result
		}
	}
	if s.ActiveState == "" {
		return "unknown"
	}
	return s.ActiveState + " (" + detail + ")"
}

// Status returns how a unit is doing.
func (c *Conn) Status(ctx context.Context, unit string) (Status, error) {
	v, err := c.get(ctx, unitPath(unit), statusProperties(unit)...)
	if err != nil {
		return Status{}, fmt.Errorf("reading the status of %q: %w", unit, err)
	}
	var s Status
	s.set(v)
	return s, nil
}

// statusProperties are what a Status of a unit is made of.
func statusProperties(unit string) []property {
	wanted := []property{{ifaceUnit, "ActiveState"}, {ifaceUnit, "SubState"}, {ifaceUnit, "InvocationID"}}
	if execInterface(unit) == ifaceService {
		for _, name := range []string{"Type", "ExecMainCode", "ExecMainStatus", "NRestarts"} {
			wanted = append(wanted, property{ifaceService, name})
		}
	}
	if iface := resultInterface(unit); iface != "" {
		wanted = append(wanted, property{iface, "Result"})
	}
	return wanted
}

// resultInterface returns the D-Bus interface that has the Result of a unit, ""
// for units that have none.
func resultInterface(unit string) string {
	switch path.Ext(unit) {
	case ".timer":
		return "org.freedesktop.systemd1.Timer"
	case ".path":
		return "org.freedesktop.systemd1.Path"
	case ".automount":
		return "org.freedesktop.systemd1.Automount"
	case ".scope":
		return "org.freedesktop.systemd1.Scope"
	default:
		return execInterface(unit)
	}
}

// set takes over what v has.
func (s *Status) set(v map[string]dbus.Variant) {
	for name, value := range v {
		switch value := value.Value().(type) {
		case string:
			switch name {
			case "ActiveState":
				s.ActiveState = value
			case "SubState":
				s.SubState = value
			case "Result":
				s.Result = value
			case "Type":
				s.Type = value
			}
		case int32:
			switch name {
			case "ExecMainCode":
				s.ExecMainCode = value
			case "ExecMainStatus":
				s.ExecMainStatus = value
			}
		case uint32:
			if name == "NRestarts" {
				s.NRestarts = value
			}
		case []byte:
			if name == "InvocationID" {
				s.InvocationID = values(v).id(name)
			}
		}
	}
}
