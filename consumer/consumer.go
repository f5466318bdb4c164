// Package consumer asks systemd which units load a credential, and makes them
// load it again. It also tells how systemd as a whole is doing, and when to ask
// anew.
//
// It speaks D-Bus with PID 1 over PID 1's own socket, which is there before the
// bus is and does not depend on it, and works with systemd 252 to 262. What a
// version does not know yet is treated as absent. It asks for named properties
// only, never for all of an object: they would carry the values of other units'
// SetCredential=.
//
// It has no policy: which units are refreshed, and how, is the caller's
// decision. It reads no credential and no store, does not log, and trusts PID 1
// and the file system's permissions on its socket.
//
// It tells what is set, not what systemd makes of it: socket units may load
// credentials and their commands are given none (seen up to 262), mount units
// none up to 257.
//
// What D-Bus does not show, it cannot tell: a unit file is known once systemd
// has loaded it, so an inactive unit that nothing refers to is missing, and a
// service that was masked while it ran has lost its settings with the next
// daemon-reload. Such a unit has to be named by the configuration.
package consumer

// A Way is how a unit loads a credential.
type Way string

// The ways there are.
const (
	WayFile        Way = "file"        // LoadCredential= with a bare name, which systemd searches in several folders
	WayPath        Way = "path"        // LoadCredential= with the full path of the store's file, or of the store
	WayImport      Way = "import"      // ImportCredential=, which may be a glob
	WaySocket      Way = "socket"      // LoadCredential= with the path of the credentials socket
	WayEnvironment Way = "environment" // EnvironmentFile= with the full path of the store's file, which may be a glob
)

// A Load is one credential that a unit loads.
type Load struct {
	Name string // in the store
	As   string // what the unit calls it; "" with [WayEnvironment]
	Way  Way
}

// A Unit is one that loads credentials, or that was asked for by name.
type Unit struct {
	Name        string // its primary name, where it was asked for by another
	LoadState   string // loaded, masked, not-found, ...
	ActiveState string
	SubState    string

	// Loads is sorted and has nothing twice. A unit that gets one file under
	// two names has two.
	Loads []Load

	// InvocationID is the unit's current or last start in hexadecimal, "" if
	// it never started.
	InvocationID string

	// LoadedUSec says since when, on CLOCK_MONOTONIC in µs, what runs now has
	// had its credentials; it may have loaded them later. It is 0 where
	// nothing is active, and where systemd does not say.
	LoadedUSec uint64
	// StartedUSec is as LoadedUSec, but of a start alone: what comes by
	// EnvironmentFile= is not read again.
	StartedUSec uint64

	Type             string // of a service: simple, oneshot, ...; "" for others
	CanReload        bool
	RefreshOnReload  bool // a reload loads the credentials anew (RefreshOnReload=credentials, systemd 260)
	ReloadTells      bool // and its process is told: Type=notify-reload, or ExecReload=
	RefuseManualStop bool // systemd restarts it only as a dependency
}

// A Start tells about a start or a reload of a unit while it is in progress.
type Start struct {
	InvocationID string // as in [Unit]
	Job          uint32 // 0 if there is none
	JobType      string // start, restart, reload, ...; "" if there is none
	ActiveState  string
	SubState     string

	// SocketNames are the IDs that the unit loads by the credentials socket,
	// in the order in which systemd lists them, which is the one in which it
	// loads them. Neither is the order of the unit file.
	SocketNames []string
}

// An Action is what a job does to a unit.
type Action string

// The actions there are.
const (
	// ActionReload reloads a unit that is running.
	ActionReload Action = "reload"
	// ActionTryRestart restarts a unit that is running, and leaves any other
	// alone. Its start limit is reset first, so that it does not count.
	ActionTryRestart Action = "tryRestart"
	// ActionRestart restarts a unit, or starts it where it does not run. Its
	// failed state and its start limit are reset first.
	ActionRestart Action = "restart"
	// ActionStart waits for a start that is in progress: it merges with that job.
	// A unit that does not run is started.
	ActionStart Action = "start"
)

// A Job is something to be done to a unit.
type Job struct {
	Unit   string
	Action Action
}

// ResultRefused is the result of a job that systemd did not queue.
const ResultRefused = "refused"

// A JobResult says how a job ended.
type JobResult struct {
	Unit   string
	Action Action

	// Result is systemd's: done, failed, canceled, timeout, dependency,
	// skipped, ...; or [ResultRefused]. Done is what a try-restart of a unit
	// that does not run ends with, too.
	Result string

	// Problem is why the job was refused, in one line; "" otherwise.
	Problem string

	// Status is the unit's after the job. It is empty where systemd does not
	// know the unit.
	Status Status
}
