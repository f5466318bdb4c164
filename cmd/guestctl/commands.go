package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/guestagent/guestagent/internal/host"
	"github.com/guestagent/guestagent/vsockrpc"
)

const (
	// probeTimeout bounds how long a VM may take to say that it is there, if
	// --timeout is not given.
	probeTimeout = 5 * time.Second
	// probeBatch is how many VMs are asked at a time, if --batch is not given.
	probeBatch = 16
)

// A program is guestctl, with the flags that all commands have.
type program struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	terminal       bool // stdout is one
	errTerminal    bool // stderr is one

	asJSON    bool
	timeout   time.Duration
	all       bool
	batch     int
	keepGoing bool
	vms       []string

	writeErr error // the first error of writing to stdout
}

func (p *program) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "guestctl",
		Short: "Put credentials into running virtual machines",
		Long: `guestctl puts credentials into running virtual machines, where guestagent keeps
them for systemd's services, and lists, removes and rolls them back there. It has
the services that use them load the new values. It tells how the machines are.

TARGETS is one guest, or several separated by commas: names of VMs and globs over
them (see guestctl list), vsock:CID[:PORT], vsock-mux:PATH[:PORT] or unix:PATH.
Several are done one after the other until the first failure, unless --batch and
--keep-going say otherwise. With --all there is no TARGETS.

Exit status: 0 done, 1 failed or refused, 2 wrong usage, 3 not healthy (wait: the
time is over), 4 unreachable, 5 rolled back by its gate; over several guests the
highest.`,
		Args:          cobra.ArbitraryArgs,
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				fmt.Fprintln(p.stderr, cmd.UsageString())
				return usage(cmd, "no command")
			}
			// Not quoted: it may be a secret that somebody put on the command line.
			msg := "no such command"
			if like := cmd.SuggestionsFor(args[0]); len(like) > 0 {
				msg += "; there is " + strings.Join(like, ", ")
			}
			return usage(cmd, msg)
		},
		CompletionOptions:          cobra.CompletionOptions{DisableDefaultCmd: true},
		SuggestionsMinimumDistance: 2,
	}
	f := root.PersistentFlags()
	f.BoolVar(&p.asJSON, "json", false, "print one JSON object per line and guest, in the wire's names")
	f.DurationVar(&p.timeout, "timeout", host.DefaultTimeout, "bound what is done to one guest by `TIME`, but not how long its units take to refresh")
	f.BoolVar(&p.all, "all", false, "all VMs of the registry, instead of TARGETS")
	f.IntVar(&p.batch, "batch", 1, "work on `N` guests at a time")
	f.BoolVar(&p.keepGoing, "keep-going", false, "go on with the other guests after a failure")
	f.StringArrayVar(&p.vms, "vms", nil, "look VMs up in `DIR`; may be repeated (default "+strings.Join(host.DefaultRegistry().Dirs, ", ")+")")
	root.SetFlagErrorFunc(flagError)
	root.SetHelpCommand(p.help())
	root.AddCommand(p.push(), p.rm(), p.list(), p.status(), p.watch(), p.wait(), p.refresh(), p.rollback(), p.retry(), p.versionCommand(), p.completion(), p.man(), p.bridge(), p.bootArgs(), p.execVMM(), p.provide(), p.exporter())
	_ = root.MarkPersistentFlagDirname("vms")
	return root
}

func usage(cmd *cobra.Command, msg string) error {
	return usageError{command: cmd.CommandPath(), msg: msg}
}

// flagError is pflag's error without the value, and without what is not the
// name of a flag.
func flagError(cmd *cobra.Command, err error) error {
	if e, ok := errors.AsType[*pflag.NotExistError](err); ok {
		if name := e.GetSpecifiedName(); e.GetSpecifiedShortnames() == "" && flagName(name) {
			return usage(cmd, "there is no flag --"+name)
		}
		return usage(cmd, "there is no such flag")
	}
	if e, ok := errors.AsType[*pflag.ValueRequiredError](err); ok {
		return usage(cmd, "--"+e.GetFlag().Name+" needs a value")
	}
	if e, ok := errors.AsType[*pflag.InvalidValueError](err); ok {
		return usage(cmd, "the value of --"+e.GetFlag().Name+" is no "+kinds[e.GetFlag().Value.Type()])
	}
	return usage(cmd, "a flag is not written as one")
}

var kinds = map[string]string{
	"bool": "true or false", "duration": "duration, such as 30s", "int": "number", "int64": "number",
}

// flagName reports whether s can be the name of a flag: words of lower-case
// letters. A value that begins with two dashes hardly is.
func flagName(s string) bool {
	return len(s) <= 24 && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz-") == ""
}

func (p *program) help() *cobra.Command {
	return &cobra.Command{
		Use:   "help [COMMAND]",
		Short: "Tell how a command is used",
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			var names []string
			for _, c := range cmd.Root().Commands() {
				if c.IsAvailableCommand() && len(args) == 0 {
					names = append(names, c.Name())
				}
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Root().Help()
			}
			for _, c := range cmd.Root().Commands() {
				if c.Name() == args[0] && len(args) == 1 {
					return c.Help()
				}
			}
			return usage(cmd.Root(), "no such command")
		},
	}
}

func (p *program) push() *cobra.Command {
	var dir, prefix, jsonFile, revision string
	var allowShadowed bool
	var params vsockrpc.ApplyParams
	var refresh refreshFlags
	cmd := &cobra.Command{
		Use:   "push TARGETS NAME:PATH|NAME:-...",
		Short: "Put credentials in force, all of them or none",
		Long: `push puts credentials in force in each guest, all of them or none. It returns when
that is done. What is in force already stays as it is, so that a push may be
repeated.

A credential is NAME:PATH, a name and the file with its value, or NAME:- for
standard input. A value is never an argument: every user could read it there.

The units that load a credential run on with the value that they have, unless
--refresh or the guest's configuration says otherwise. With --refresh auto they
are reloaded where systemd then loads credentials anew (RefreshOnReload=credentials,
systemd 260) and the process is told, else restarted; units that do not run are left
alone.

With --gate the units are watched for that long. If one fails, restarts by itself
or does not come up, the values before are put in force again, the units are
refreshed once more, and the exit status is 5. What was rolled back is refused
until it changes, or guestctl retry.`,
		Example: `  guestctl push web api-key:./api-key
  pass show db | guestctl push 'web*,db' db-password:-
  guestctl push --all --dir "$CREDENTIALS_DIRECTORY" --prefix guest. --prune --dry-run
  guestctl push vsock:3 --json-file credentials.json --revision 2026-11
  guestctl push web tls-key:./tls-key --refresh auto --gate 30s`,
		ValidArgsFunction: p.completeTargets,
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			rest, err := p.check(cmd, args)
			if err != nil {
				return err
			}
			changed := cmd.Flags().Changed
			forms := 0
			for _, there := range []bool{len(rest) > 0, changed("dir"), changed("json-file")} {
				if there {
					forms++
				}
			}
			switch {
			case forms == 0 && len(args) == 1 && strings.Contains(args[0], "=") && !strings.Contains(args[0], ":"):
				_, _, err := host.ParseArgument(args[0])
				return usage(cmd, fmt.Sprintf("TARGETS come first, and then credentials: %v", err))
			case forms == 0:
				return usage(cmd, "nothing to push: name credentials as NAME:PATH, or give --dir or --json-file")
			case forms > 1:
				return usage(cmd, "credentials come from NAME:PATH, from --dir or from --json-file, and not from several of them")
			case changed("prefix") && !changed("dir"):
				return usage(cmd, "--prefix is of the files of --dir")
			case params.Prune && len(rest) > 0:
				return usage(cmd, "--prune removes what is not in the set, and needs the whole of it: give --dir or --json-file")
			case changed("prune-prefix") && !params.Prune:
				return usage(cmd, "--prune-prefix is of --prune")
			case len(revision) > vsockrpc.MaxRevisionLen:
				return usage(cmd, fmt.Sprintf("--revision is longer than %d bytes", vsockrpc.MaxRevisionLen))
			}
			if params.Refresh, params.Gate, err = refresh.get(cmd, setRefreshes); err != nil {
				return err
			}
			if err := host.CheckArguments(rest); err != nil {
				return usage(cmd, err.Error())
			}
			if params.ExpectedGeneration, err = expected(cmd); err != nil {
				return err
			}
			fleet, err := p.fleet(cmd, args)
			if err != nil {
				return err
			}
			switch {
			case changed("dir"):
				params.Set, err = host.ReadDir(dir, prefix)
			case changed("json-file"):
				params.Set, err = host.ReadJSONFile(jsonFile, p.stdin)
			default:
				params.Set, err = host.ReadArguments(rest, p.stdin)
			}
			if err != nil {
				return err
			}
			defer params.Wipe()
			if err := host.CheckSet(params.Set); err != nil {
				return err
			}
			for i := range params.Set {
				if params.Set[i].Revision == "" {
					params.Set[i].Revision = revision
				}
				params.Set[i].AllowShadowed = allowShadowed
			}
			return p.do(cmd, fleet, writeChange, func(fleet host.Fleet, ctx context.Context, emit func(host.Result)) error {
				return fleet.Push(ctx, &params, emit)
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&dir, "dir", "", "take every file of `DIR` as a credential, such as $CREDENTIALS_DIRECTORY")
	f.StringVar(&prefix, "prefix", "", "take only the files of --dir that begin with `P`, and take it off")
	f.StringVar(&jsonFile, "json-file", "", "take the credentials of `FILE`, - for standard input: {\"systemd.credentials\": [{\"name\", \"text\" or \"data\"}]}")
	f.BoolVar(&params.Prune, "prune", false, "remove what was pushed before and is not in --dir or --json-file")
	f.StringVar(&params.PrunePrefix, "prune-prefix", "", "let --prune remove only names that begin with `P`")
	f.StringVar(&revision, "revision", "", "label the values `R`, for list; never derive it from a value")
	f.BoolVar(&allowShadowed, "allow-shadowed", false, "push names although systemd finds another file first")
	f.BoolVar(&params.DryRun, "dry-run", false, "change nothing, say what would come of it")
	f.BoolVar(&params.Forget, "forget", false, "keep no previous values for rollback")
	f.BoolVar(&params.Ephemeral, "ephemeral", false, "push names, too, that the VM's provider manages, until that applies its set again")
	expectedFlag(f)
	refresh.add(cmd, setRefreshes)
	refresh.addGate(cmd)
	_ = cmd.MarkFlagDirname("dir")
	_ = cmd.MarkFlagFilename("json-file", "json")
	return cmd
}

func (p *program) rm() *cobra.Command {
	var params vsockrpc.RemoveParams
	var dryRun bool
	var refresh refreshFlags
	cmd := &cobra.Command{
		Use:               "rm TARGETS NAME...",
		Short:             "Remove credentials",
		Long:              "rm removes credentials from each guest. Names that are not there are unchanged.",
		Example:           "  guestctl rm web api-key",
		ValidArgsFunction: p.completeTargets,
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if params.Names, err = p.check(cmd, args); err != nil {
				return err
			}
			if len(params.Names) == 0 {
				return usage(cmd, "nothing to remove: name credentials")
			}
			if err := host.CheckNames(params.Names); err != nil {
				return usage(cmd, err.Error())
			}
			if params.ExpectedGeneration, err = expected(cmd); err != nil {
				return err
			}
			if params.Refresh, _, err = refresh.get(cmd, setRefreshes); err != nil {
				return err
			}
			fleet, err := p.fleet(cmd, args)
			if err != nil {
				return err
			}
			return p.do(cmd, fleet, writeChange, func(fleet host.Fleet, ctx context.Context, emit func(host.Result)) error {
				if dryRun { // Remove has none
					return fleet.Push(ctx, &vsockrpc.ApplyParams{
						Remove: params.Names, ExpectedGeneration: params.ExpectedGeneration, Forget: params.Forget, DryRun: true, Refresh: params.Refresh,
					}, emit)
				}
				return fleet.Remove(ctx, &params, emit)
			})
		},
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "change nothing, say what would come of it")
	cmd.Flags().BoolVar(&params.Forget, "forget", false, "keep no previous values for rollback")
	expectedFlag(cmd.Flags())
	refresh.add(cmd, setRefreshes)
	return cmd
}

func (p *program) list() *cobra.Command {
	return &cobra.Command{
		Use:   "list [TARGETS]",
		Short: "List the credentials of guests, or the VMs",
		Long: `list lists the credentials of a guest, and the units that load them; of several
guests, one line per guest. Values are never shown: no guest gives one back.

A unit is stale if it runs, and may have another value than the one in force:
guestctl refresh mends that. What else there is to know goes to standard error:
units that wait for a credential, a set that is on trial, one that was rolled back.

Without TARGETS it lists the VMs of this host, and whether their agents answer.`,
		Example:           "  guestctl list\n  guestctl list web\n  guestctl list --all --json",
		ValidArgsFunction: p.completeTargets,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 && !p.all {
				return p.listVMs(cmd)
			}
			if err := p.checkTargets(cmd, args); err != nil {
				return err
			}
			fleet, err := p.fleet(cmd, args)
			if err != nil {
				return err
			}
			write, call := writeSummary, operation(host.Fleet.List)
			if len(fleet.Guests) == 1 {
				write = writeEntries
			}
			if len(fleet.Guests) == 1 || p.asJSON {
				call = host.Fleet.ListConsumers
			}
			return p.do(cmd, fleet, write, call)
		},
	}
}

// listVMs lists the VMs. That one cannot be reached is what one wants to know,
// and no failure.
func (p *program) listVMs(cmd *cobra.Command) error {
	if _, err := p.check(cmd, []string{""}); err != nil {
		return err
	}
	guests, err := p.registry().List()
	if len(guests) == 0 {
		if err == nil {
			fmt.Fprintf(p.stderr, "guestctl: there is no VM in %s; NAME.json there, with {\"target\": \"vsock:3\"}, makes one\n", strings.Join(p.registry().Dirs, ", "))
		}
		return err
	}
	fleet := host.Fleet{Guests: guests, Batch: p.batch, Timeout: p.timeout}
	if !cmd.Flags().Changed("batch") {
		fleet.Batch = probeBatch
	}
	if !cmd.Flags().Changed("timeout") {
		fleet.Timeout = probeTimeout
	}
	return errors.Join(p.do(cmd, fleet, writeVM, host.Fleet.Probe), err)
}

func (p *program) refresh() *cobra.Command {
	var params vsockrpc.RefreshParams
	var refresh refreshFlags
	cmd := &cobra.Command{
		Use:   "refresh TARGETS [NAME...]",
		Short: "Have the units load the values in force",
		Long: `refresh has the units of each guest load the values in force: those that load one
of the credentials that are named, or any, and are stale. Units that do not run are
left alone.`,
		Example:           "  guestctl refresh web\n  guestctl refresh 'web*' tls-key --refresh restart --all-consumers",
		ValidArgsFunction: p.completeTargets,
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if params.Names, err = p.check(cmd, args); err != nil {
				return err
			}
			if err := host.CheckNames(params.Names); err != nil {
				return usage(cmd, err.Error())
			}
			if params.Refresh, _, err = refresh.get(cmd, refreshes); err != nil {
				return err
			}
			fleet, err := p.fleet(cmd, args)
			if err != nil {
				return err
			}
			return p.do(cmd, fleet, writeRefresh, func(fleet host.Fleet, ctx context.Context, emit func(host.Result)) error {
				return fleet.Refresh(ctx, &params, emit)
			})
		},
	}
	cmd.Flags().BoolVar(&params.All, "all-consumers", false, "refresh running units that are not stale, too")
	refresh.add(cmd, refreshes)
	return cmd
}

func (p *program) rollback() *cobra.Command {
	var params vsockrpc.RollbackParams
	var refresh refreshFlags
	cmd := &cobra.Command{
		Use:               "rollback TARGETS",
		Short:             "Put back what the last push or removal replaced",
		Long:              "rollback puts back, in each guest, what the last set replaced, as a new generation.",
		Example:           "  guestctl rollback web\n  guestctl rollback web --refresh auto",
		ValidArgsFunction: p.completeTargets,
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if err := p.checkTargets(cmd, args); err != nil {
				return err
			}
			if params.ExpectedGeneration, err = expected(cmd); err != nil {
				return err
			}
			if params.Refresh, _, err = refresh.get(cmd, setRefreshes); err != nil {
				return err
			}
			fleet, err := p.fleet(cmd, args)
			if err != nil {
				return err
			}
			return p.do(cmd, fleet, writeChange, func(fleet host.Fleet, ctx context.Context, emit func(host.Result)) error {
				return fleet.Rollback(ctx, &params, emit)
			})
		},
	}
	expectedFlag(cmd.Flags())
	refresh.add(cmd, setRefreshes)
	return cmd
}

func (p *program) retry() *cobra.Command {
	var params vsockrpc.RetryParams
	var refresh refreshFlags
	cmd := &cobra.Command{
		Use:   "retry TARGETS",
		Short: "Put in force again what a gate rolled back",
		Long: `retry puts the set in force again that was rolled back last by its gate, in each
guest, as a new generation. Until then, or until its bytes change, a guest refuses
it. guestctl list tells of it.`,
		Example:           "  guestctl retry web --gate 2m",
		ValidArgsFunction: p.completeTargets,
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if err := p.checkTargets(cmd, args); err != nil {
				return err
			}
			if params.ExpectedGeneration, err = expected(cmd); err != nil {
				return err
			}
			if params.Refresh, params.Gate, err = refresh.get(cmd, setRefreshes); err != nil {
				return err
			}
			fleet, err := p.fleet(cmd, args)
			if err != nil {
				return err
			}
			return p.do(cmd, fleet, writeChange, func(fleet host.Fleet, ctx context.Context, emit func(host.Result)) error {
				return fleet.Retry(ctx, &params, emit)
			})
		},
	}
	expectedFlag(cmd.Flags())
	refresh.add(cmd, setRefreshes)
	refresh.addGate(cmd)
	return cmd
}

// checkTargets is check where there are no arguments but TARGETS.
func (p *program) checkTargets(cmd *cobra.Command, args []string) error {
	rest, err := p.check(cmd, args)
	if err == nil && len(rest) > 0 {
		return usage(cmd, cmd.Name()+" takes no arguments but TARGETS; several are separated by commas")
	}
	return err
}

// The words that --refresh takes where a set changes, and of the command refresh.
var (
	refreshes    = []string{vsockrpc.RefreshAuto, vsockrpc.RefreshReload, vsockrpc.RefreshRestart}
	setRefreshes = append([]string{vsockrpc.RefreshNone}, refreshes...)
)

// refreshFlags are --refresh and --gate.
type refreshFlags struct {
	refresh string
	gate    time.Duration
}

func (r *refreshFlags) add(cmd *cobra.Command, words []string) {
	def := " (default: the guest's configuration)"
	if !slices.Contains(words, vsockrpc.RefreshNone) {
		def = " (default: auto)"
	}
	cmd.Flags().StringVar(&r.refresh, "refresh", "", "have the units load the new values by `HOW`: "+strings.Join(words, ", ")+def)
	_ = cmd.RegisterFlagCompletionFunc("refresh", cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp))
}

func (r *refreshFlags) addGate(cmd *cobra.Command) {
	cmd.Flags().DurationVar(&r.gate, "gate", 0, "watch the units for `TIME`, 1s to 1h, and roll back if one does not stand it; implies --refresh auto")
}

// get returns what the flags say. What stands for a word is not quoted.
func (r *refreshFlags) get(cmd *cobra.Command, words []string) (refresh string, gate time.Duration, err error) {
	if cmd.Flags().Changed("refresh") && !slices.Contains(words, r.refresh) {
		return "", 0, usage(cmd, "--refresh takes one of "+strings.Join(words, ", "))
	}
	if !cmd.Flags().Changed("gate") {
		return r.refresh, 0, nil
	}
	switch {
	case r.gate < vsockrpc.MinGate || r.gate > vsockrpc.MaxGate || r.gate%time.Second != 0:
		return "", 0, usage(cmd, "--gate takes whole seconds from 1s to 1h")
	case r.refresh == vsockrpc.RefreshNone:
		return "", 0, usage(cmd, "--gate watches units that are refreshed: there are none with --refresh none")
	case r.refresh == "":
		return vsockrpc.RefreshAuto, r.gate, nil
	}
	return r.refresh, r.gate, nil
}

func (p *program) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "version",
		Short:             "Print the version",
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usage(cmd, "version takes no arguments")
			}
			_, err := fmt.Fprintln(p.stdout, "guestctl", version)
			return err
		},
	}
}

func (p *program) completion() *cobra.Command {
	shells := []string{"bash", "zsh", "fish"}
	return &cobra.Command{
		Use:   "completion bash|zsh|fish",
		Short: "Print a shell's completion script",
		Example: `  guestctl completion bash > /etc/bash_completion.d/guestctl
  guestctl completion zsh > "${fpath[1]}/_guestctl"
  guestctl completion fish > ~/.config/fish/completions/guestctl.fish`,
		ValidArgsFunction: cobra.FixedCompletions(shells, cobra.ShellCompDirectiveNoFileComp),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 || !slices.Contains(shells, args[0]) {
				return usage(cmd, "completion takes the name of a shell: bash, zsh or fish")
			}
			switch args[0] {
			case "bash":
				return cmd.Root().GenBashCompletionV2(p.stdout, true)
			case "zsh":
				return cmd.Root().GenZshCompletion(p.stdout)
			}
			return cmd.Root().GenFishCompletion(p.stdout, true)
		},
	}
}

// check checks the flags that all commands have, and returns the arguments
// that are not TARGETS.
func (p *program) check(cmd *cobra.Command, args []string) (rest []string, err error) {
	switch {
	case p.batch < 1:
		return nil, usage(cmd, "--batch is below 1")
	case p.timeout <= 0:
		return nil, usage(cmd, "--timeout is not above 0")
	case p.all:
		return args, nil
	case len(args) == 0:
		return nil, usage(cmd, "no TARGETS: name a VM, or write vsock:CID, vsock-mux:PATH or unix:PATH, or --all")
	}
	return args[1:], nil
}

func (p *program) registry() host.Registry {
	if len(p.vms) > 0 {
		return host.Registry{Dirs: p.vms}
	}
	return host.DefaultRegistry()
}

// fleet resolves TARGETS.
func (p *program) fleet(cmd *cobra.Command, args []string) (host.Fleet, error) {
	f := host.Fleet{Batch: p.batch, KeepGoing: p.keepGoing, Timeout: p.timeout}
	var err error
	if p.all {
		f.Guests, err = p.registry().All()
	} else {
		f.Guests, err = p.registry().Resolve(args[0])
	}
	if errors.Is(err, host.ErrTargets) {
		return f, usage(cmd, err.Error())
	}
	return f, err
}

// An operation is a method of [host.Fleet], or like one.
type operation func(f host.Fleet, ctx context.Context, emit func(host.Result)) error

// do does something to the guests, and shows what comes of it. Until then a
// signal just ends the program, which may wait for standard input; from then on
// it ends the calls, so that what came of each guest is still told. A second
// one ends the program.
func (p *program) do(cmd *cobra.Command, f host.Fleet, w writer, call operation) error {
	ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	defer context.AfterFunc(ctx, stop)()
	out := p.results(&f, w)
	return out.end(call(f, ctx, out.emit))
}

func expectedFlag(f *pflag.FlagSet) {
	f.Int64("expected-generation", 0, "do it only if generation `N` is in force")
}

// expected returns the value of --expected-generation, nil if it is not given.
func expected(cmd *cobra.Command) (*int64, error) {
	if !cmd.Flags().Changed("expected-generation") {
		return nil, nil
	}
	n, err := cmd.Flags().GetInt64("expected-generation")
	if err != nil {
		return nil, err
	}
	if n < 0 {
		return nil, usage(cmd, "--expected-generation is below 0")
	}
	return &n, nil
}

// completeTargets completes the last of TARGETS by the names of VMs.
func (p *program) completeTargets(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 || p.all {
		if cmd.Name() == "push" {
			return nil, cobra.ShellCompDirectiveDefault // the PATH of NAME:PATH
		}
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	before := word[:strings.LastIndexByte(word, ',')+1]
	guests, _ := p.registry().List()
	var words []string
	for _, g := range guests {
		if strings.HasPrefix(before+g.Name, word) {
			words = append(words, cobra.CompletionWithDesc(before+g.Name, vsockrpc.Escape(g.Target.String(), maxShown)))
		}
	}
	return words, cobra.ShellCompDirectiveNoFileComp
}
