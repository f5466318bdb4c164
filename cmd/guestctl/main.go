// Guestctl puts credentials into running virtual machines, lists, removes and
// rolls them back there, and has the services that use them load the new values.
// It tells how those machines are.
//
// A value comes from a file or standard input, never from an argument. What
// stands where a name belongs may be a value by mistake: no message repeats it
// before it can be a name. What a guest says is escaped before it is shown.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/guestagent/guestagent/internal/host"
)

// version is set by the linker.
var version = "devel"

// statusUsage is the exit status after a command line that makes no sense.
const statusUsage = 2

// A usageError is a command line that makes no sense.
type usageError struct {
	command string
	msg     string
}

func (e usageError) Error() string { return fmt.Sprintf("%s (%s --help tells more)", e.msg, e.command) }

func main() {
	// Whoever stops reading does not stop what is done to the guests halfway.
	signal.Ignore(syscall.SIGPIPE)
	err := run(context.Background(), asBridge(os.Args), os.Stdin, os.Stdout, os.Stderr)
	if err == nil {
		return
	}
	fmt.Fprintln(os.Stderr, "guestctl:", err)
	os.Exit(status(err))
}

func status(err error) int {
	if errors.As(err, new(usageError)) {
		return statusUsage
	}
	if e, ok := errors.AsType[waitError](err); ok {
		return e.status
	}
	return host.Status(err)
}

func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	// First of all: what follows has secrets in memory.
	if err := host.Harden(); err != nil {
		return err
	}
	p := &program{stdin: stdin, stdout: stdout, stderr: stderr, terminal: isTerminal(stdout), errTerminal: isTerminal(stderr)}
	root := p.root()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		err = p.writeErr
	}
	return err
}

// isTerminal reports whether w is a terminal, or another device that takes
// characters.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	st, err := f.Stat()
	return err == nil && st.Mode()&os.ModeCharDevice != 0
}
