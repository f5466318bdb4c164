package host

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// maxEarly bounds how many connections may come before our own, in listen.
const maxEarly = 1024

// A folder is one that somebody else may change, held by a descriptor: what is
// done in it is done there, whatever its path has become.
type folder struct {
	fd    int
	path  string
	owner owner
	mode  uint32
}

// A folderError is that there is something in the folder's place.
type folderError string

func (e folderError) Error() string { return string(e) }

func openFolder(path string) (folder, error) {
	// O_PATH needs no permission for the folder itself, and NOFOLLOW is for the
	// last component alone.
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return folder{}, folderError(fmt.Sprintf("%q is a symbolic link or no folder; name the folder itself, with its real path", path))
	}
	if err != nil {
		return folder{}, &fs.PathError{Op: "opening the folder", Path: path, Err: err}
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		_ = unix.Close(fd)
		return folder{}, &fs.PathError{Op: "looking at the folder", Path: path, Err: err}
	}
	return folder{fd: fd, path: path, owner: owner{int(st.Uid), int(st.Gid)}, mode: st.Mode}, nil
}

func (f folder) close() { _ = unix.Close(f.fd) }

// id is what the name stands for, itself and not where it links to.
func (f folder) id(name string) (fileID, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(f.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fileID{}, err
	}
	return idOf(&st), nil
}

func idOf(st *unix.Stat_t) fileID {
	return fileID{dev: uint64(st.Dev), ino: st.Ino} //nolint:unconvert,nolintlint // Dev is 32 bits on some machines
}

// removeIf removes the name if it stands for that file. Whoever puts something
// else there at the last moment may have it removed: it is a name, never a
// folder, in a folder where they could remove it themselves.
func (f folder) removeIf(name string, want fileID) error {
	id, err := f.id(name)
	if err != nil {
		return err
	}
	if id != want {
		return errSwapped
	}
	return unix.Unlinkat(f.fd, name, 0)
}

// pin holds what the name stands for, without opening it.
func (f folder) pin(name string) (int, unix.Stat_t, error) {
	var st unix.Stat_t
	fd, err := unix.Openat(f.fd, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, st, err
	}
	if err := unix.Fstat(fd, &st); err != nil {
		_ = unix.Close(fd)
		return -1, st, err
	}
	return fd, st, nil
}

// procPath names what a descriptor holds. Paths of sockets have at most 107
// bytes, and this is short; and bind(2) and connect(2) take no descriptor.
func procPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

func (s *boundSocket) unpin() { _ = unix.Close(s.pin) }

// chown gives the socket itself away, whatever its name has become.
func (s *boundSocket) chown(to owner) error {
	var st unix.Stat_t
	if err := unix.Fstat(s.pin, &st); err != nil {
		return err
	}
	if int(st.Uid) == to.uid && int(st.Gid) == to.gid {
		return nil
	}
	return unix.Fchownat(s.pin, "", to.uid, to.gid, unix.AT_EMPTY_PATH)
}

// A liveID is the error that somebody listens on that socket.
type liveID fileID

func (liveID) Error() string { return "another program listens there" }

// errSwapped is that the name is not what it was a moment ago.
var errSwapped = errors.New("the name was taken away or replaced in that moment; if that goes on, find out who does it in this folder")

// listen binds a socket by that name, mode 0600 and ours, in the place of one
// that nobody listens on.
func (f folder) listen(name string) (*boundSocket, error) {
	fd, err := streamSocket()
	if err != nil {
		return nil, err
	}
	// The file of the socket gets the mode of the socket (unix_bind in
	// net/unix/af_unix.c), less the umask, so that it is right from the start.
	if err := unix.Fchmod(fd, 0o600); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("setting the socket's mode: %w", err)
	}
	s, err := f.listenOn(fd, name)
	if err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	file := os.NewFile(uintptr(fd), "socket")
	l, err := net.FileListener(file) // has a descriptor of its own
	_ = file.Close()
	var ok bool
	if s.l, ok = l.(*net.UnixListener); !ok {
		s.unpin()
		closeAll(s.early)
		return nil, fmt.Errorf("taking over the socket: want a Unix socket, have %T: %w", l, err)
	}
	s.l.SetUnlinkOnClose(false)
	return s, nil
}

func closeAll(conns []net.Conn) {
	for _, c := range conns {
		_ = c.Close()
	}
}

func streamSocket() (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	return fd, nil
}

// listenOn is listen with a socket, which stays the caller's: it makes no
// listener of it.
func (f folder) listenOn(fd int, name string) (*boundSocket, error) {
	address := &unix.SockaddrUnix{Name: procPath(f.fd) + "/" + name}
	if room := maxSocketPath - len(procPath(f.fd)+"/"); len(name) > room {
		return nil, fmt.Errorf("the name has %d bytes, and a socket's at most %d; give the socket a shorter one", len(name), room)
	}
	// It follows no link, and takes no name that stands for something.
	err := unix.Bind(fd, address)
	if errors.Is(err, unix.EADDRINUSE) {
		if err := f.clear(name); err != nil {
			return nil, err
		}
		if err = unix.Bind(fd, address); errors.Is(err, unix.EADDRINUSE) {
			return nil, errSwapped
		}
	}
	if errors.Is(err, unix.EROFS) {
		return nil, fmt.Errorf("bind: %w; name the folder in the unit's ReadWritePaths=, or the one above where it is made anew with its VM, and restart the provider", err)
	}
	if err != nil {
		return nil, os.NewSyscallError("bind", err)
	}

	// From here on the name may be anybody's.
	pin, st, err := f.pin(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errSwapped
	}
	if err != nil {
		return nil, fmt.Errorf("looking at the new socket: %w", err)
	}
	fail := func(err error) (*boundSocket, error) {
		_ = unix.Close(pin)
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK || int64(st.Uid) != int64(os.Geteuid()) || st.Nlink != 1 {
		return fail(errSwapped)
	}
	if st.Mode&0o7777 != 0o600 {
		_ = f.removeIf(name, idOf(&st))
		return fail(fmt.Errorf("the new socket has mode %#o, not 0600; set a umask that lets the owner read and write, and no mode on the file system", st.Mode&0o7777))
	}
	if err := unix.Listen(fd, unix.SOMAXCONN); err != nil {
		return fail(os.NewSyscallError("listen", err))
	}
	// Another socket of ours may have been moved there. A connection through
	// the pin that arrives here shows that it is this one.
	early, err := reach(fd, pin)
	if err != nil {
		return fail(err)
	}
	return &boundSocket{pin: pin, id: idOf(&st), early: early}, nil
}

// reach reports whether who connects to the file that pin holds arrives at the
// socket fd, and gives those that came before. As long as the socket is root's
// they can only be root's.
func reach(fd, pin int) ([]net.Conn, error) {
	probe, err := streamSocket()
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Close(probe) }()
	// Without a name the kernel finds one that nobody else has.
	if err := unix.Bind(probe, &unix.SockaddrUnix{}); err != nil {
		return nil, os.NewSyscallError("bind", err)
	}
	own, err := unix.Getsockname(probe)
	if err != nil {
		return nil, os.NewSyscallError("getsockname", err)
	}
	ours, ok := own.(*unix.SockaddrUnix)
	if !ok || len(ours.Name) < 2 {
		return nil, errors.New("the kernel gave the probing socket no name")
	}
	if err := unix.Connect(probe, &unix.SockaddrUnix{Name: procPath(pin)}); err != nil {
		return nil, fmt.Errorf("%w (connecting to it: %v)", errSwapped, err)
	}
	var early []net.Conn
	drop := func(err error) ([]net.Conn, error) {
		closeAll(early)
		return nil, err
	}
	for range maxEarly {
		c, from, err := unix.Accept4(fd, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
		if errors.Is(err, unix.EAGAIN) {
			return drop(errSwapped)
		}
		if err != nil {
			return drop(os.NewSyscallError("accept", err))
		}
		if peer, ok := from.(*unix.SockaddrUnix); ok && peer.Name == ours.Name {
			_ = unix.Close(c)
			return early, nil
		}
		file := os.NewFile(uintptr(c), "connection")
		if conn, err := net.FileConn(file); err == nil {
			early = append(early, conn)
		}
		_ = file.Close()
	}
	return drop(fmt.Errorf("more than %d connections came at once", maxEarly))
}

// clear removes the name if it is a socket that nobody listens on.
func (f folder) clear(name string) error {
	pin, st, err := f.pin(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("looking at what is there: %w", err)
	}
	defer func() { _ = unix.Close(pin) }()
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return fmt.Errorf("%s is there, and is left alone; remove it", kind(st.Mode))
	}
	probe, err := streamSocket()
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(probe) }()
	err = unix.Connect(probe, &unix.SockaddrUnix{Name: procPath(pin)})
	switch {
	case err == nil, errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EPROTOTYPE):
		return liveID(idOf(&st)) // it listens, its queue is full, or it is no stream
	case !errors.Is(err, unix.ECONNREFUSED):
		return fmt.Errorf("asking who listens there already: %w; remove the socket if nobody does", err)
	}
	if err := f.removeIf(name, idOf(&st)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing a socket that nobody listens on: %w; remove it by hand", err)
	}
	return nil
}

func kind(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFLNK:
		return "a symbolic link"
	case unix.S_IFDIR:
		return "a folder"
	case unix.S_IFREG:
		return "a file"
	}
	return "something that is no socket"
}

// ListenLocal listens on the provider's own Unix socket: mode 0600, or 0660
// with that group, by name or by number, if it is not "". The folder is made
// 0755 where it is missing, and must be one that only root, or this process's
// user, can write to. What nobody listens on is replaced; if somebody does, or
// has the lock path.lock, the error matches [ErrProviderRuns]. Close removes
// the socket and gives the lock back; the lock's file stays.
func ListenLocal(path, group string) (net.Listener, error) {
	l, err := listenLocal(path, group)
	if err != nil {
		return nil, fmt.Errorf("listening at %q: %w", path, err)
	}
	return l, nil
}

func listenLocal(path, group string) (_ net.Listener, err error) {
	gid := -1
	if group != "" {
		n, err := lookupGroup(group)
		if err != nil {
			return nil, fmt.Errorf("looking up the group: %w", err)
		}
		gid = *n
	}
	l := &localListener{name: filepath.Base(path), path: path, lock: -1}
	if err := mkdirAll(filepath.Dir(path)); err != nil {
		return nil, fmt.Errorf("making the folder: %w", err)
	}
	if l.dir, err = openFolder(filepath.Dir(path)); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			l.release()
		}
	}()
	if uid := l.dir.owner.uid; uid != 0 && uid != os.Geteuid() || l.dir.mode&0o022 != 0 {
		return nil, fmt.Errorf("the folder %q has mode %#o and is user %d's: others could take the socket's place; choose one that only root can write to", l.dir.path, l.dir.mode&0o7777, uid)
	}
	if l.lock, err = unix.Openat(l.dir.fd, l.name+".lock", unix.O_RDWR|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0o600); err != nil {
		return nil, fmt.Errorf("opening its lock: %w", err)
	}
	if err := unix.Flock(l.lock, unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		return nil, fmt.Errorf("%w, and has its lock; stop that one first", ErrProviderRuns)
	} else if err != nil {
		return nil, fmt.Errorf("taking its lock: %w", err)
	}
	s, err := l.dir.listen(l.name)
	if _, ok := errors.AsType[liveID](err); ok {
		return nil, fmt.Errorf("%w, or another program listens there; stop that one first, `ss -xlp` shows it", ErrProviderRuns)
	}
	if err != nil {
		return nil, err
	}
	if gid >= 0 {
		err := unix.Fchownat(s.pin, "", -1, gid, unix.AT_EMPTY_PATH)
		if err == nil {
			// There is no fchmod for such a descriptor before Linux 6.6.
			err = unix.Chmod(procPath(s.pin), 0o660)
		}
		if err != nil {
			_ = l.dir.removeIf(l.name, s.id)
			_ = s.close()
			return nil, fmt.Errorf("giving the socket to the group %s: %w", group, err)
		}
	}
	l.boundSocket = s
	return l, nil
}

// A localListener is a socket in a folder of root's, and its lock.
type localListener struct {
	*boundSocket
	dir        folder
	name, path string
	lock       int
	once       sync.Once
}

var _ net.Listener = (*localListener)(nil)

func (l *localListener) Accept() (net.Conn, error) { return l.accept() }

func (l *localListener) Addr() net.Addr { return &net.UnixAddr{Name: l.path, Net: "unix"} }

func (l *localListener) Close() error {
	err := error(net.ErrClosed)
	l.once.Do(func() {
		_ = l.dir.removeIf(l.name, l.id)
		err = l.close()
		l.release()
	})
	return err
}

// release gives back what listenLocal took besides the socket.
func (l *localListener) release() {
	if l.lock >= 0 {
		_ = unix.Close(l.lock)
	}
	l.dir.close()
}
