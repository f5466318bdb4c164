// Package credsocket serves credentials to units that load them from a socket:
// LoadCredential=NAME:/absolute/path, systemd.exec(5).
//
// systemd's protocol (load_credential in src/core/exec-credential.c, until 255
// src/core/credential.c, and read_full_file_full in src/basic/fileio.c): a
// child of PID 1, as root, binds to the abstract address
// <hex>/unit/UNIT/NAME, connects, shuts its writing side, and reads to the end.
// What it has read is the credential. There is no way to say no in-band: the
// end without a byte is an empty credential, and the unit starts with it.
//
// Guarantees:
//
//   - A connection that was accepted ends after a whole value, or after more
//     than 1 MiB of zeros, which makes systemd fail the unit. There is no third
//     way: a request that nobody can answer now waits.
//   - That holds across SIGKILL. Connections lie in the service manager's file
//     descriptor store and are taken up again by the next process. What the
//     next process has to know of a connection is written on the connection
//     itself, before the first byte.
//   - Only root gets a value. Everybody can bind to an abstract address.
//   - A value goes from its file to the peer inside the kernel.
//
// There is one gap, two system calls wide: who is killed after accept(2) and
// before the connection lies in the store hands out an empty credential.
//
// The package decides nothing. Who may load what, and from where, is behind
// [Server.Decide]. It trusts root: a process of root's can pose as any unit.
package credsocket

import (
	"context"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"time"
)

// DefaultMaxWaiting is how many connections are held at a time where
// [Server.MaxWaiting] is 0. FileDescriptorStoreMax= of the service must be at
// least that: PID 1 drops what does not fit, and tells nobody.
const DefaultMaxWaiting = 512

// A Request is what a unit asks for.
type Request struct {
	// Unit is the unit's full name, such as "web@1.service".
	Unit string
	// Name is the credential's name, as the unit calls it.
	Name string
}

// A Decision says what becomes of a request. The zero Decision lets it wait.
type Decision struct {
	// Value is given: Size bytes from the start of the file, wherever its
	// offset stands. The server closes the file. The kernel may hand over its
	// pages instead of a copy, so the file must not be written to any more;
	// replace it by rename.
	Value *os.File
	// Size is the length of the value in bytes, at most 1 MiB. A file that
	// turns out to be shorter fails the unit.
	Size int64
	// Given, where it is not nil, is called once the kernel has the whole
	// value, for the record, and before the unit knows that this is all. A
	// process that is killed right before does not call it, and one that is
	// killed right after fails the unit. It runs on the server's one loop and
	// must not block for long.
	Given func()
	// Refuse fails the unit, with or without a Value. It is logged, and so
	// must not carry a secret.
	Refuse error
}

// An FDStore keeps a copy of a file descriptor for the process that comes
// after this one. Both calls are made from one goroutine.
type FDStore interface {
	// Keep stores a copy of fd. The caller keeps its own.
	Keep(name string, fd int) error
	// Drop closes the copy of that name. That there is none is no error:
	// PID 1 drops by itself what its peer has closed.
	Drop(name string) error
}

// A Waiting is a request that is not answered yet.
type Waiting struct {
	Request
	// Since is when the connection was first accepted, perhaps by a process
	// before this one.
	Since time.Time
}

// A Server answers the requests of one listening socket. Its fields must not
// change once Serve was called. The zero Server refuses everything.
type Server struct {
	// Decide says what becomes of a request. It is called by one goroutine, one
	// request at a time, in the order of arrival, and again for everybody who
	// waits after each Retry. It may block, but must return when ctx ends; what
	// it returns then does not count. A panic refuses the request. Nil refuses
	// every request.
	Decide func(ctx context.Context, r Request) Decision
	// Store keeps connections beyond this process. Nil keeps none: then whoever
	// waits when the process ends gets an empty credential, see FailWaiting.
	Store FDStore
	// Wait is the longest that a request waits, counted from when its
	// connection was first accepted. Then the unit is failed. 0 leaves that to
	// the unit's own time-out.
	Wait time.Duration
	// MaxWaiting is how many connections are held at a time;
	// DefaultMaxWaiting where it is 0. More are not accepted: they wait in the
	// backlog of the socket.
	MaxWaiting int
	// UID is whose connections are answered. It is 0, root's, but in tests.
	UID int
	// Busy, where it is not nil, is called with the number of connections that
	// are held, whenever that changes. It is called from the server's one loop
	// and must not block.
	Busy func(n int)
	// Log gets requests at debug level, failed units and refusals as warnings.
	// Nil is nowhere.
	Log *slog.Logger

	state
}

// The names of connections in the store: the prefix, the time of acceptance
// (CLOCK_MONOTONIC in microseconds, hex), and a number that tells apart what
// one process accepts within a microsecond. No two processes of one boot share
// a time.
const storedPrefix = "credential-"

// storedName returns the name in the store of a connection that was accepted
// at that time since boot.
func storedName(accepted time.Duration, seq uint64) string {
	return storedPrefix + strconv.FormatInt(accepted.Microseconds(), 16) + "-" + strconv.FormatUint(seq, 16)
}

// parseStoredName is the reverse of storedName.
func parseStoredName(name string) (accepted time.Duration, ok bool) {
	rest, ok := strings.CutPrefix(name, storedPrefix)
	if !ok {
		return 0, false
	}
	at, seq, ok := strings.Cut(rest, "-")
	if !ok {
		return 0, false
	}
	usec, err := strconv.ParseInt(at, 16, 64)
	if err != nil || usec < 0 || usec > int64(1<<63-1)/int64(time.Microsecond) {
		return 0, false
	}
	n, err := strconv.ParseUint(seq, 16, 64)
	if err != nil {
		return 0, false
	}
	accepted = time.Duration(usec) * time.Microsecond
	if storedName(accepted, n) != name { // a sign, a leading zero, an upper-case digit
		return 0, false
	}
	return accepted, true
}

// IsStored reports whether a name from $LISTEN_FDNAMES is that of a connection
// which a server has put into the store.
func IsStored(name string) bool {
	_, ok := parseStoredName(name)
	return ok
}
