// Package health says how a guest is: it reads the guest's own figures, judges
// them together with what the caller knows, and watches those that nothing else
// tells of.
//
// It is given what systemd, the store and the provider say, and asks none of
// them. A verdict follows from its input alone: [Judge] keeps nothing and looks at
// nothing. A [Collector] reads /proc and asks file systems; no part of that may
// hold up the others or the caller. Nothing here logs, and nothing is changed but
// for the kernel's triggers that [Collector.Watch] sets, which end with it.
//
// It trusts the kernel's figures. Names and details come from others: it leaves
// them as they are, and the caller has escaped and bounded them before.
package health

import "time"

// A Verdict is how a guest is, in one word.
type Verdict string

// The verdicts there are, the weightiest first: the one of a guest is the
// weightiest that one of its reasons has, and Healthy where there is none.
const (
	Failing  Verdict = "failing"  // it cannot do what it is for, or soon will not
	Starting Verdict = "starting" // it is not done yet with what a boot is
	Degraded Verdict = "degraded" // it works, and somebody has to look at it
	Healthy  Verdict = "healthy"
)

// A Code is a reason in one word. docs/operations.md has a section for each.
type Code string

// The codes there are. What each makes of a guest says the table codes.
const (
	Maintenance         Code = "maintenance"         // systemd is in emergency or rescue mode
	SMBIOSUnreadable    Code = "smbiosUnreadable"    // there is a table, and it cannot be read
	ProviderUnreachable Code = "providerUnreachable" // the provider has not handed over its set, and time is up
	DiskFull            Code = "diskFull"            // a file system has hardly any room left
	MemoryPressure      Code = "memoryPressure"      // tasks wait for memory instead of working
	SystemStarting      Code = "systemStarting"      // systemd has not finished the boot
	ProviderWaiting     Code = "providerWaiting"     // the provider has not handed over its set yet
	SystemStopping      Code = "systemStopping"      // the guest is shutting down
	SystemdUnknown      Code = "systemdUnknown"      // PID 1 does not say how it is
	UnitFailed          Code = "unitFailed"          // a unit has failed
	RejectedInForce     Code = "rejectedInForce"     // values are in force that a gate had rolled back
	RolledBack          Code = "rolledBack"          // a gate rolled a set back
	Interrupted         Code = "interrupted"         // a set is half in force
	Missing             Code = "missing"             // somebody removed a credential
	Foreign             Code = "foreign"             // somebody replaced or changed a credential
	Shadowed            Code = "shadowed"            // systemd finds another file of that name first
	Mismatch            Code = "mismatch"            // PID 1 has other bytes than the OEM string
	Refused             Code = "refused"             // a credential was not taken
	ConsumerStale       Code = "consumerStale"       // a unit runs with another value than the one in force
	ConsumerWaiting     Code = "consumerWaiting"     // a unit waits for a credential
	StoreSwappable      Code = "storeSwappable"      // credentials may reach a disk
	ConfigFault         Code = "configFault"         // part of the configuration does not apply
	SMBIOSDamaged       Code = "smbiosDamaged"       // the table is not sound; what could be read was
	NotImported         Code = "notImported"         // no import has run since the guest booted
	DiskLow             Code = "diskLow"             // a file system fills up
	Unknown             Code = "unknown"             // something could not be found out in time
	Confidential        Code = "confidential"        // SMBIOS was not read, since the host is not trusted
	SMBIOSOff           Code = "smbiosOff"           // SMBIOS was not read, since the configuration says so
	NoSMBIOS            Code = "noSmbios"            // the VM has none
)

// A Reason is something about a guest that is not as it should be, or a remark.
type Reason struct {
	Code Code
	// Verdict is what this reason alone makes of the guest; Healthy for a remark.
	Verdict Verdict
	// Unit and Credential are what it is about, "" where it is about none.
	Unit, Credential string
	// Since is zero where it is not known.
	Since time.Time
	// Detail is one line. It has no figures that change all the time.
	Detail string
	// Hint is the next command to type, "" if there is none: in the guest, unless
	// it begins with guestctl, where VM stands for the guest and PATH for a file.
	Hint string
}

// Rules narrow what is judged. The zero value has the defaults. No percentage may
// be negative; one above 100 is never reached.
type Rules struct {
	// Ignore says of which units a failure does not count; nil is of none.
	Ignore func(unit string) bool
	// DiskDegraded and DiskFailing are percent of a file system in use, as df(1)
	// counts them; 0 means 90 and 98.
	DiskDegraded, DiskFailing int
	// MemoryDegraded and MemoryFailing are percent of ten seconds in which some
	// task waited for memory, or all that could have run did; 0 means 20.
	MemoryDegraded, MemoryFailing int
}

func (r Rules) withDefaults() Rules {
	for _, d := range []struct {
		percent *int
		def     int
	}{{&r.DiskDegraded, 90}, {&r.DiskFailing, 98}, {&r.MemoryDegraded, 20}, {&r.MemoryFailing, 20}} {
		if *d.percent == 0 {
			*d.percent = d.def
		}
	}
	return r
}

// A Guest is all that is judged. Its strings are the caller's to escape and to
// bound: each is one line of at most about 1 KiB.
type Guest struct {
	Figures Figures
	System  System

	Stale   []Use // units that run with another value than the one in force
	Waiting []Use // units that wait for a credential

	// Credentials, so that Unit is "". Shadowed's Detail names the other file.
	Shadowed, Mismatched, Missing, Foreign []Use
	// Refused are credentials that were not taken; Detail says why.
	Refused []Use
	// RolledBack are sets that a gate rolled back; Detail names what was in them.
	RolledBack []Use

	// Provider is none, waiting, unreachable or inForce, as on the wire. That it is
	// unreachable is said by a reason in Others, which knows why.
	Provider string

	// Others are what the caller found by itself. Their verdicts follow from their
	// codes, whatever they say.
	Others []Reason
}

// System is what PID 1 says of itself.
type System struct {
	Version string
	// State is systemd's SystemState: running, degraded, starting, ...
	State  string
	Failed []FailedUnit
	Jobs   int // that are queued
	// Problem is why PID 1 is not known, "" where it is.
	Problem string
}

// A FailedUnit is a unit in the state failed.
type FailedUnit struct {
	Unit   string
	Result string    // systemd's: exit-code, timeout, ...
	Since  time.Time // zero where it is not known
}

// A Use is a unit and a credential that are not at one, or either alone.
type Use struct {
	Unit, Credential string
	Since            time.Time // zero where it is not known
	Detail           string    // "" where there is nothing to add
}

// Figures are what a [Collector] found. Sizes are bytes.
type Figures struct {
	Hostname string        // the kernel's, which a privileged guest process sets to any bytes
	Uptime   time.Duration // since the guest booted
	// Load is the load of 1, 5 and 15 minutes in hundredths.
	Load     [3]int
	Memory   Memory
	Pressure Pressure
	// Disks are the file systems, in the order of the collector's paths.
	Disks []Disk
	// Unknown are the parts that could not be found out, or not in time: hostname, uptime,
	// load, memory, pressure, or disk and a path. Their figures are zero.
	Unknown []string
}

// Memory is the guest's, as /proc/meminfo has it.
type Memory struct {
	Total     uint64
	Available uint64 // without swapping
}

// Pressure is what tasks wait for. One is nil where the kernel does not tell,
// which is no fault: it may be built or booted without PSI.
type Pressure struct {
	CPU, Memory, IO *Stall
}

// A Stall is the share of time in which some task waited, and in which all that
// could have run did. Full is zero where the kernel has none.
type Stall struct {
	Some, Full Share
}

// A Share is a share of the last 10, 60 and 300 seconds, in hundredths of a
// percent. The kernel's averages are weighted: they take some seconds to follow.
type Share struct {
	Avg10, Avg60, Avg300 int
	// Over is set where the kernel told of a stall in the last ten seconds that is
	// above the threshold of a [Collector.Watch].
	Over bool
}

// A Disk is a file system.
type Disk struct {
	Path string
	// They are as df(1) has them: what is kept for root is in Total alone.
	Total, Used, Available uint64
	// ReadOnly is whether the file system itself is, not only the view of it that
	// is seen at Path.
	ReadOnly bool
}
