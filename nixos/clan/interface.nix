# The settings of role `server`. They are JSON: no functions, and nothing that only a machine's own configuration knows.
{ lib, ... }:
let
  inherit (lib) mkOption types;

  # An option that leaves microvm.nix, or whoever else knows it, its default.
  unset =
    type: option:
    mkOption (
      option
      // {
        type = types.nullOr type;
        default = null;
      }
    );
  # Names of credentials and files. The host's module says what is wrong with one that systemd does not take.
  inherit (types) str;

  interface.options = {
    type = mkOption {
      type = types.enum [
        "user"
        "tap"
        "macvtap"
        "bridge"
      ];
      description = "The interface's type.";
    };
    id = mkOption {
      type = str;
      description = "The interface's name on the host. No two VMs of a host may share one.";
    };
    mac = mkOption {
      type = str;
      description = "The MAC address that the guest sees.";
    };
    bridge = unset str {
      description = "The bridge on the host, for `type = \"bridge\"`.";
    };
    macvtap = {
      link = unset str {
        description = "The interface on the host that it is attached to, for `type = \"macvtap\"`.";
      };
      mode =
        unset
          (types.enum [
            "private"
            "vepa"
            "bridge"
            "passthru"
            "source"
          ])
          {
            description = "The mode of macvtap, for `type = \"macvtap\"`.";
          };
    };
    tap.vhost = mkOption {
      type = types.bool;
      default = false;
      description = "Whether the host's kernel moves the packets, for `type = \"tap\"`.";
    };
  };

  credential.options = {
    source = unset str {
      example = "/etc/secrets/api-key";
      description = ''
        A file on the host: an absolute path, not in the Nix store. For a clan var, set `generator` instead: there is no
        `config` here that would know its path.
      '';
    };
    generator = unset str {
      example = "test-vm-secrets";
      description = "The generator of a clan var of this machine, which is declared in the machine's configuration.";
    };
    file = unset str {
      description = "The generator's file, by default the name of this entry.";
    };
    destination = unset str {
      example = "API-KEY";
      description = "The credential's name in the guest, behind the prefix; by default the name of this entry.";
    };
    required = mkOption {
      type = types.bool;
      default = true;
      description = "Whether the provider fails where there is no such file. Otherwise the guest is given the others.";
    };
  };

  runtimeSecret.options = {
    oemCredentialName = unset str {
      example = "API_KEY";
      description = ''
        The credential's name in the guest, without a prefix; by default the name of this entry. It is delivered over
        vsock, and is an OEM string at boot only with `bootCredentials`.
      '';
    };
  };
in
{
  options = {
    vmName = unset (types.strMatching "[a-zA-Z0-9][a-zA-Z0-9._-]*") {
      example = "test-vm";
      description = "The VM's name: `microvm.vms.NAME` and `microvm@NAME.service`. By default the instance's name.";
    };
    guest = unset str {
      example = "web";
      description = ''
        The machine of this clan that lives in the VM. It needs role `guest` in the same instance, and is configured as any
        other machine; `guestModules` and `microvm.vms.NAME.extraModules` are not for it. Its system is built and updated
        with the host's, and `systemctl restart microvm@NAME` there starts what is new. Without one the VM has the
        configuration that the host gives it: these settings, `guestModules`, and `microvm.vms.NAME.config` and
        `.extraModules` on the host.
      '';
    };
    autostart = mkOption {
      type = types.bool;
      default = true;
      description = "Whether the VM starts when the host boots.";
    };
    vcpu = unset types.ints.positive {
      example = 2;
      description = "How many virtual CPUs the VM has. By default microvm.nix decides.";
    };
    mem = unset types.ints.positive {
      example = 1024;
      description = "The VM's memory, in MiB. By default microvm.nix decides.";
    };
    interfaces = mkOption {
      type = types.listOf (types.submodule interface);
      default = [ ];
      description = "The VM's network interfaces, as in `microvm.interfaces`.";
    };
    vsockCid = unset (types.ints.between 3 4294967294) {
      example = 3;
      description = ''
        The VM's vsock address, by which the host and the guest reach each other; no other VM of the host may have it. The
        VM needs one, from here or as `microvm.vsock.cid` in its configuration.
      '';
    };
    hypervisor =
      unset
        (types.enum [
          "alioth"
          "cloud-hypervisor"
          "crosvm"
          "firecracker"
          "kvmtool"
          "qemu"
        ])
        {
          example = "cloud-hypervisor";
          description = "What runs the VM, of those that microvm.nix gives a vsock. By default it decides, and takes qemu.";
        };

    credentials = mkOption {
      type = types.attrsOf (types.submodule credential);
      default = { };
      example = {
        api-key = {
          generator = "test-vm-secrets";
          destination = "API-KEY";
        };
      };
      description = ''
        What the guest is given of the files and the clan vars of the host. Each has either a `source` or a `generator`.
        Where clan deploys vars with sops, an update that changes one restarts the provider, and never the VM.
      '';
    };
    credentialPrefix = mkOption {
      type = str;
      default = "HOST-";
      description = "What the names of `credentials` begin with in the guest.";
    };
    runtimeSecrets = mkOption {
      type = types.attrsOf (types.submodule runtimeSecret);
      default = { };
      example = {
        api-key.oemCredentialName = "API_KEY";
      };
      description = ''
        Secrets that are made here: each is the file NAME of a generator `microvm-VM-NAME`, with 32 random bytes from
        `openssl rand -base64`. For another one, set `clan.core.vars.generators."microvm-VM-NAME".script` in the machine's
        configuration.
      '';
    };
    bootCredentials = mkOption {
      type = types.bool;
      default = false;
      description = ''
        Whether the secrets are OEM strings at boot as well, for what needs one before the agent has it. The VM is
        restarted for such a value to change there.
      '';
    };
    exposeOnCommandLine = mkOption {
      type = types.bool;
      default = false;
      description = ''
        Whether `bootCredentials` may put the secrets onto the command line of a VMM that takes OEM strings nowhere else
        (cloud-hypervisor). Every process on the host that sees `/proc` can read them there.
      '';
    };
    staticOemStrings = mkOption {
      type = types.listOf str;
      default = [ ];
      example = [ "io.systemd.credential:ENVIRONMENT=test" ];
      description = ''
        Public OEM strings, which the guest has when it boots: `io.systemd.credential:NAME=VALUE` or
        `io.systemd.credential.binary:NAME=BASE64`. A VM without SMBIOS has them on its kernel command line instead, as
        `systemd.set_credential=`. They are in the Nix store, where everybody can read them.
      '';
    };

    serviceHardening = {
      enable = mkOption {
        type = types.bool;
        default = true;
        description = ''
          Whether `microvm@NAME.service` is shut in: the options below, no capabilities, no new privileges, no core dumps,
          no setuid files, and neither `/home` nor `/etc` nor the kernel's settings to write to. What the machine's own
          configuration says for one of these wins. With an interface of type `bridge`, whose helper has a capability that
          the VMM has not, only the file systems are shut off.
        '';
      };
      protectProc = mkOption {
        type = types.enum [
          "default"
          "invisible"
          "noaccess"
          "ptraceable"
        ];
        default = "invisible";
        description = "systemd's `ProtectProc=`: which other processes the VMM sees in `/proc`.";
      };
      procSubset =
        unset
          (types.enum [
            "all"
            "pid"
          ])
          {
            example = "pid";
            description = ''
              systemd's `ProcSubset=`: whether the VMM sees in `/proc` anything but processes. By default `pid`; with crosvm
              `all`, as the sandboxes of its devices need `/proc/sys/kernel/cap_last_cap`.
            '';
          };
      restrictAddressFamilies = mkOption {
        type = types.listOf str;
        default = [
          "AF_UNIX"
          "AF_VSOCK"
          "AF_INET"
          "AF_INET6"
        ];
        description = "systemd's `RestrictAddressFamilies=`: of which kinds the VMM may open sockets.";
      };
    };

    rootPassword = mkOption {
      type = types.either types.bool str;
      default = false;
      description = ''
        Whether root in the guest has a password, which clan generates: `clan vars get MACHINE
        microvm-VM-root-password/password` shows it. The guest is given its hash. A password itself is refused: it would
        be in the repository, and in the store of each machine.
      '';
    };
    enableSsh = mkOption {
      type = types.bool;
      default = false;
      description = ''
        Whether the guest has an SSH server: on its network, and over vsock from the host (`ssh vsock/CID`, or `ssh
        vsock-mux/SOCKET`). Who may log in, `guestModules` say.
      '';
    };
    guestModules = mkOption {
      type = types.listOf types.raw;
      default = [ ];
      example = [ { services.nginx.enable = true; } ];
      description = ''
        NixOS configuration for the guest, as sets of plain values. What has a function in it belongs to the host's
        configuration, as `microvm.vms.NAME.extraModules`; from the inventory that is `roles.server.extraModules`.
      '';
    };
  };
}
