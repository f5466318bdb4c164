package main

import (
	"github.com/spf13/cobra"

	"github.com/guestagent/guestagent/internal/host"
)

func (p *program) execVMM() *cobra.Command {
	var c host.ExecConfig
	cmd := &cobra.Command{
		Use:   "exec-vmm [--string S]... [--dir DIR --on-command-line] -- cloud-hypervisor ARGS...",
		Short: "Start cloud-hypervisor with more OEM strings",
		Long: `exec-vmm adds OEM strings to cloud-hypervisor's --platform, which it takes once, and
becomes cloud-hypervisor: the process stays the same. What is in --platform stays
there, other arguments are not touched.

cloud-hypervisor takes OEM strings from its command line only, where every user of
the host reads them, and writes them into snapshots. Credentials are refused for
that, unless --on-command-line says that it does not matter: have the guest pull them
(guestctl provide). A public string that names the provider is what this is for.

cloud-hypervisor has SMBIOS on x86-64 only.`,
		Example: `  guestctl exec-vmm --string io.guestagent.provider:vsock:2:1021 -- cloud-hypervisor --kernel vmlinux ...
  guestctl exec-vmm --dir ./test --on-command-line -- cloud-hypervisor --platform uuid=U --kernel vmlinux ...`,
		RunE: func(cmd *cobra.Command, args []string) error {
			switch dash := cmd.ArgsLenAtDash(); {
			case dash < 0:
				return usage(cmd, "there is no --; write it before cloud-hypervisor, so that its flags are its own")
			case dash > 0:
				return usage(cmd, "something stands before --; exec-vmm takes no arguments but the program and its own")
			case c.OnCommandLine && c.Dir == "":
				return usage(cmd, "--on-command-line is of the files of --dir")
			}
			if err := checkOEMFlags(cmd, &c.OEMConfig); err != nil {
				return err
			}
			if err := host.CheckVMM(args); err != nil {
				return usage(cmd, err.Error())
			}
			c.Args = args
			argv, warnings, err := host.PlanExec(c)
			if err != nil {
				return err
			}
			p.warn(warnings)
			return host.Exec(argv)
		},
	}
	oemFlags(cmd, &c.OEMConfig)
	cmd.Flags().BoolVar(&c.OnCommandLine, "on-command-line", false, "let the credentials of --dir stand on the command line, for every user of the host to read")
	return cmd
}
