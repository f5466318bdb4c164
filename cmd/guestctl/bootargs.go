package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/guestagent/guestagent/internal/host"
)

// families are the words that --family takes, the default first.
var families = []string{host.FamilyAgent, host.FamilySystemd}

// vmms are the words that --vmm takes.
var vmms = []string{host.VMMQEMU, host.VMMCrosvm}

// oemFlags are the flags that say what a VM gets as OEM strings.
func oemFlags(cmd *cobra.Command, c *host.OEMConfig) {
	f := cmd.Flags()
	f.StringVar(&c.Dir, "dir", "", "take every file of `DIR` as a credential, such as $CREDENTIALS_DIRECTORY")
	f.StringVar(&c.Prefix, "prefix", "", "take only the files of --dir that begin with `P`, and take it off")
	f.StringVar(&c.Family, "family", host.FamilyAgent, "say for whom the credentials are, `WHO`: "+strings.Join(families, ", ")+", which is PID 1")
	f.StringArrayVar(&c.Strings, "string", nil, "add the public string `S`, such as io.guestagent.provider:vsock:2:1021; may be repeated")
	_ = cmd.MarkFlagDirname("dir")
	_ = cmd.RegisterFlagCompletionFunc("family", cobra.FixedCompletions(families, cobra.ShellCompDirectiveNoFileComp))
}

// checkOEMFlags checks them. What stands for a word is not quoted.
func checkOEMFlags(cmd *cobra.Command, c *host.OEMConfig) error {
	changed := cmd.Flags().Changed
	switch {
	case changed("dir") && c.Dir == "":
		return usage(cmd, "--dir is empty; is $CREDENTIALS_DIRECTORY set?")
	case changed("prefix") && c.Dir == "":
		return usage(cmd, "--prefix is of the files of --dir")
	case !slices.Contains(families, c.Family):
		return usage(cmd, "--family takes one of "+strings.Join(families, ", "))
	case c.Dir == "" && len(c.Strings) == 0:
		return usage(cmd, "nothing to pass: give credentials with --dir, or a public string with --string")
	}
	if err := host.CheckOEMStrings(c.Strings); err != nil {
		return usage(cmd, "--string: "+err.Error())
	}
	return nil
}

// warn shows warnings.
func (p *program) warn(warnings []string) {
	for _, w := range warnings {
		fmt.Fprintf(p.stderr, "guestctl: warning: %s\n", w)
	}
}

func (p *program) bootArgs() *cobra.Command {
	var c host.BootConfig
	var print0 bool
	cmd := &cobra.Command{
		Use:   "boot-args --vmm VMM [--dir DIR] [--string S]... --out FOLDER",
		Short: "Prepare a VM's boot with credentials as OEM strings",
		Long: `boot-args writes the credentials of a folder into files that a VMM reads at the
boot, and prints the VMM's arguments, one per line. They have no secret: a value
is in no argument, only in files of mode 0600, in a folder of mode 0700. The folder
belongs below /run; files of an earlier run are removed from it.

With --vmm qemu the arguments are -smbios type=11,path=FILE, and with --fw-cfg
-fw_cfg name=opt/io.systemd.credentials/NAME,file=FILE; with --vmm crosvm they are
--cfg FILE, which crosvm has had until October 2025. For cloud-hypervisor there is
guestctl exec-vmm.

Credentials are for the agent (--family guestagent), which can replace them later.
Those for PID 1 (--family systemd, and always with --fw-cfg) stay as they are until
the next boot. What does not fit, by its size, number or name, is an error: leave it
out, and have the guest pull it.`,
		Example: `  guestctl boot-args --vmm qemu --dir "$CREDENTIALS_DIRECTORY" --prefix web. --out /run/vm/web
  args=$(guestctl boot-args --vmm qemu --dir ./web --out /run/vm/web) && exec qemu-system-x86_64 ... $args
  guestctl boot-args --vmm qemu --string io.guestagent.provider:vsock:2:1021 --print0`,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			changed := cmd.Flags().Changed
			switch {
			case len(args) > 0:
				return usage(cmd, "boot-args takes no arguments; credentials come from --dir")
			case !slices.Contains(vmms, c.VMM):
				return usage(cmd, "--vmm takes one of "+strings.Join(vmms, ", ")+"; for cloud-hypervisor there is guestctl exec-vmm")
			case c.FwCfg && c.VMM != host.VMMQEMU:
				return usage(cmd, "--fw-cfg is of --vmm qemu")
			case c.FwCfg && changed("family") && c.Family == host.FamilyAgent:
				return usage(cmd, "--fw-cfg is for PID 1, and the agent does not look there: leave one of --fw-cfg and --family guestagent out")
			case c.FwCfg && c.Dir == "":
				return usage(cmd, "--fw-cfg is of the files of --dir")
			case c.LargeTable && c.VMM != host.VMMQEMU:
				return usage(cmd, "--large-table is of --vmm qemu; crosvm has no place for one")
			case c.Out == "" && (c.Dir != "" || c.VMM != host.VMMQEMU):
				return usage(cmd, "--out is missing: the folder for the files that the VMM reads")
			}
			if err := checkOEMFlags(cmd, &c.OEMConfig); err != nil {
				return err
			}
			if c.FwCfg {
				c.Family = host.FamilySystemd
			}
			boot, err := host.PlanBoot(c)
			if err != nil {
				return err
			}
			defer boot.Wipe()
			end := "\n"
			if print0 {
				end = "\x00"
			} else if err := boot.CheckShell(); err != nil {
				return err
			}
			if err := boot.Write(); err != nil {
				return err
			}
			p.warn(boot.Warnings)
			if _, err := fmt.Fprint(p.stdout, strings.Join(append(boot.Args, ""), end)); err != nil {
				return fmt.Errorf("writing the arguments: %w", err)
			}
			return nil
		},
	}
	oemFlags(cmd, &c.OEMConfig)
	f := cmd.Flags()
	f.StringVar(&c.VMM, "vmm", "", "prepare it for `VMM`: "+strings.Join(vmms, ", "))
	f.StringVar(&c.Out, "out", "", "write the files into `FOLDER`, which is made if it is not there")
	f.StringVar(&c.Owner, "owner", "", "have the files belong to `USER[:GROUP]`, who runs the VMM")
	f.BoolVar(&c.FwCfg, "fw-cfg", false, "give QEMU the credentials as fw_cfg files for PID 1, not as OEM strings")
	f.BoolVar(&c.LargeTable, "large-table", false, "let the table have up to 256 KiB; the guest's firmware has to be UEFI or SeaBIOS 1.17")
	f.BoolVar(&print0, "print0", false, "end each argument with a NUL, not a newline")
	_ = cmd.MarkFlagDirname("out")
	_ = cmd.RegisterFlagCompletionFunc("vmm", cobra.FixedCompletions(vmms, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}
