package health

import (
	"errors"
	"strconv"
	"strings"
	"time"
)

// The parsers take what a kernel of today writes and what one of tomorrow may:
// lines and columns that they do not know are passed over.

// parseMeminfo parses /proc/meminfo.
func parseMeminfo(s string) (Memory, error) {
	var m Memory
	have := 0
	for line := range strings.Lines(s) {
		key, rest, _ := strings.Cut(line, ":")
		var to *uint64
		switch key {
		case "MemTotal":
			to = &m.Total
		case "MemAvailable":
			to = &m.Available
		default:
			continue
		}
		fields := strings.Fields(rest)
		if len(fields) != 2 || fields[1] != "kB" {
			return Memory{}, errors.New("reading meminfo: " + key + " is not in kB")
		}
		kib, err := strconv.ParseUint(fields[0], 10, 54)
		if err != nil {
			return Memory{}, errors.New("reading meminfo: " + key + " is no number")
		}
		*to = kib << 10
		have++
	}
	if have != 2 {
		return Memory{}, errors.New("reading meminfo: it has no MemTotal and MemAvailable")
	}
	return m, nil
}

// parseStall parses a file of /proc/pressure. cpu has no line full before Linux
// 5.13, and only zeros there later.
func parseStall(s string) (*Stall, error) {
	var stall Stall
	some := false
	for line := range strings.Lines(s) {
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		var to *Share
		switch fields[0] {
		case "some":
			to, some = &stall.Some, true
		case "full":
			to = &stall.Full
		default:
			continue
		}
		have := 0
		for _, f := range fields[1:] {
			key, value, _ := strings.Cut(f, "=")
			var avg *int
			switch key {
			case "avg10":
				avg = &to.Avg10
			case "avg60":
				avg = &to.Avg60
			case "avg300":
				avg = &to.Avg300
			default:
				continue
			}
			var ok bool
			if *avg, ok = parseHundredths(value); !ok {
				return nil, errors.New("reading a pressure: " + key + " is no number")
			}
			have++
		}
		if have != 3 {
			return nil, errors.New("reading a pressure: an average is missing")
		}
	}
	if !some {
		return nil, errors.New("reading a pressure: it has no line some")
	}
	return &stall, nil
}

// parseLoad parses /proc/loadavg.
func parseLoad(s string) ([3]int, error) {
	var load [3]int
	fields := strings.Fields(s)
	if len(fields) < len(load) {
		return load, errors.New("reading the load: it has no three averages")
	}
	for i := range load {
		var ok bool
		if load[i], ok = parseHundredths(fields[i]); !ok {
			return [3]int{}, errors.New("reading the load: an average is no number")
		}
	}
	return load, nil
}

// parseUptime parses /proc/uptime.
func parseUptime(s string) (time.Duration, error) {
	fields := strings.Fields(s)
	if len(fields) == 0 {
		return 0, errors.New("reading the uptime: there is none")
	}
	n, ok := parseHundredths(fields[0])
	if !ok {
		return 0, errors.New("reading the uptime: it is no number")
	}
	return time.Duration(n) * 10 * time.Millisecond, nil
}

// parseHundredths parses a number with two decimals, such as 12.34 for 1234. What
// it takes for one is at most 1e11, which as hundredths of seconds a Duration can hold.
func parseHundredths(s string) (int, bool) {
	whole, fraction, ok := strings.Cut(s, ".")
	if !ok || len(fraction) != 2 || len(whole) == 0 || len(whole) > 9 {
		return 0, false
	}
	n := 0
	for _, c := range []byte(whole + fraction) {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = n*10 + int(c-'0')
	}
	return n, true
}

// A mount is what /proc/self/mountinfo says of the file system that is mounted.
type mount struct {
	// device is MAJOR:MINOR, the same for all subvolumes of one file system, which
	// for stat(2) have a device each.
	device   string
	readOnly bool // it, not the mount
}

// parseMount finds a mount by its ID in /proc/self/mountinfo (proc_pid_mountinfo(5)).
func parseMount(s string, id uint64) (mount, bool) {
	want := strconv.FormatUint(id, 10) + " "
	for line := range strings.Lines(s) {
		if !strings.HasPrefix(line, want) {
			continue
		}
		before, after, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " - ")
		fields := strings.Fields(before)
		// Type, source, options. A source may be empty.
		system := strings.SplitN(after, " ", 3)
		if len(fields) < 6 || len(system) < 3 {
			return mount{}, false
		}
		first, _, _ := strings.Cut(system[2], ",")
		return mount{device: fields[2], readOnly: first == "ro"}, true
	}
	return mount{}, false
}
