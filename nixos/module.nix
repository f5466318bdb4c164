# services.guestagent: the agent in a NixOS guest.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  cfg = config.services.guestagent;
  json = pkgs.formats.json { };
  inherit (lib) types;

  # A key of config.json. The agent knows the defaults: a key that nobody sets is null here, and not written.
  key =
    option:
    lib.mkOption (
      option
      // {
        type = types.nullOr option.type;
        default = null;
      }
    );
  withoutUnset =
    settings:
    lib.filterAttrs (_: v: v != null && v != { }) (
      lib.mapAttrs (_: v: if lib.isAttrs v then withoutUnset v else v) settings
    );
  # From how many percent on.
  threshold =
    description:
    key {
      type = types.ints.between 1 101;
      inherit description;
    };
  # The longest time that the agent takes, a year.
  seconds = types.ints.between 0 (366 * 24 * 60 * 60);

  configFile = json.generate "guestagent-config.json" (withoutUnset cfg.settings);

  # A drop-in that the package has and that is not for everybody.
  dropIn =
    unit: name:
    pkgs.linkFarm "guestagent-${name}" {
      "lib/systemd/system/${unit}.d/${name}.conf" = "${cfg.package}/share/guestagent/${name}.conf";
    };
in
{
  options.services.guestagent = {
    enable = lib.mkEnableOption "guestagent, which installs the credentials that the host gives this VM";

    package = lib.mkOption {
      type = types.package;
      default = pkgs.callPackage ./package.nix { };
      defaultText = lib.literalExpression "pkgs.callPackage ./package.nix { }";
      description = "The package with the agent and its units.";
    };

    provider.holdBoot = lib.mkOption {
      type = types.bool;
      default = false;
      description = ''
        Whether every ordinary service starts after `guestagent-credentials.target`: once the host has handed over the
        credentials, or the time for that (`settings.provider.timeout`) is up. By default only those services do that say
        so themselves.
      '';
    };

    settings = {
      consumers.compare = key {
        type = types.bool;
        description = ''
          Whether to tell what a unit runs with by reading what systemd gave it; by default the time when it was loaded
          decides. `true` lets the agent's service see the credentials of every service.
        '';
      };

      credentials = lib.mkOption {
        type = types.attrsOf (
          types.submodule {
            options = {
              onChange = key {
                type = types.enum [
                  "none"
                  "auto"
                  "reload"
                  "restart"
                ];
                description = ''
                  How the units that load the credential are refreshed when it changes and the call does not say; by
                  default not at all. `auto` reloads where systemd then loads credentials anew
                  (`RefreshOnReload=credentials`), and restarts elsewhere.
                '';
              };
              restartUnits = key {
                type = types.listOf types.str;
                example = [ "pgbouncer.service" ];
                description = "Units to restart when the credential changes, whether they load it or not.";
              };
              reloadUnits = key {
                type = types.listOf types.str;
                example = [ "nginx.service" ];
                description = "Units to reload when the credential changes, whether they load it or not.";
              };
            };
          }
        );
        default = { };
        example.db-password.onChange = "auto";
        description = "What a change of a credential brings about, by the credential's name.";
      };

      health = {
        disk = {
          degraded = threshold "From how many percent in use a file system makes the guest degraded. By default 90; 101 is never.";
          failing = threshold "From how many percent in use a file system makes the guest failing. By default 98; 101 is never.";
        };
        ignoreUnits = key {
          type = types.listOf types.str;
          example = [ "nightly-*.service" ];
          description = "Units, with wildcards, whose failure says nothing about the guest's health. By default none.";
        };
        memory = {
          degraded = threshold "From how many percent of ten seconds in which some task waited for memory the guest is degraded. By default 20; 101 is never.";
          failing = threshold "From how many percent of ten seconds in which everything waited for memory the guest is failing. By default 20; 101 is never.";
        };
      };

      names.allow = key {
        type = types.listOf types.str;
        example = [ "ssh.*" ];
        description = ''
          Names, or prefixes that end in `*`, that the host may set while the guest runs although systemd itself acts on
          them. By default none.
        '';
      };

      peer.privilegedPort = key {
        type = types.enum [
          "required"
          "ignored"
        ];
        description = ''
          Whether the host has to call from a port below 1024, which only its root can. By default it has to. `ignored`
          is for VMMs that show vsock as a Unix socket (cloud-hypervisor, Firecracker, vhost-device-vsock): they choose
          the port, and the permissions of that socket are the guard.
        '';
      };

      policy.load = lib.mkOption {
        type = types.attrsOf (types.listOf types.str);
        default = { };
        example."db-*" = [
          "web.service"
          "worker@*.service"
        ];
        description = ''
          Which units, with wildcards, may load a credential over the credentials socket, by its name or by a prefix
          that ends in `*`. What none of these matches, any unit may load; `"*" = [ ]` turns that round.
        '';
      };

      previous.ttl = key {
        type = seconds;
        example = 3600;
        description = ''
          How many seconds the values that a set replaced are kept for rollback. By default, and with 0, until the next
          set.
        '';
      };

      provider = {
        address = key {
          type = types.str;
          example = "vsock:2:1020";
          description = ''
            Where the host's provider listens, `vsock:CID[:PORT]`, on a vhost-vsock host with a port from 768 to 1021 that
            is this guest's alone. By default the host says so at boot, or nobody is
            asked.
          '';
        };
        required = key {
          type = types.bool;
          description = ''
            Whether `guestagent-credentials.target` fails when the provider has not handed over the credentials in time.
            By default it is reached then all the same, and the provider is asked again later.
          '';
        };
        timeout = key {
          type = seconds;
          example = 120;
          description = "How many seconds `guestagent-credentials.target` waits for the provider. By default 30.";
        };
      };

      refresh.never = key {
        type = types.listOf types.str;
        example = [ "postgresql.service" ];
        description = ''
          Units, with wildcards, that are never refreshed for loading a credential. It replaces the default:
          `systemd-*`, `*getty@*`, `user@*`, `sshd*@*` and `dbus*`.
        '';
      };

      smbios.read = key {
        type = types.enum [
          "auto"
          "always"
          "never"
        ];
        description = ''
          Whether to read credentials from SMBIOS OEM strings. `auto`, the default, reads them unless this is a
          confidential VM: there the host, who writes them, is not trusted. `always` reads them there too, `never` reads
          them nowhere.
        '';
      };

      socket.wait = key {
        type = seconds;
        example = 300;
        description = ''
          How many seconds a unit may wait on the credentials socket for a credential that has not arrived; then it
          fails. By default, and with 0, as long as its own start may take.
        '';
      };
    };
  };

  config = lib.mkIf cfg.enable {
    environment.etc."guestagent/config.json".source = configFile;
    environment.systemPackages = [ cfg.package ];

    # NixOS takes the units from the package but ignores their [Install] sections. run-credstore.mount needs none: the
    # import pulls it in.
    systemd.packages = [
      cfg.package
    ]
    ++ lib.optional (cfg.settings.consumers.compare != null && cfg.settings.consumers.compare) (
      dropIn "guestagent.service" "compare"
    )
    ++ lib.optional cfg.provider.holdBoot (dropIn "guestagent-credentials.target" "hold-boot");
    systemd.services.guestagent-import.wantedBy = [ "sysinit.target" ];
    systemd.sockets.guestagent.wantedBy = [ "sockets.target" ];
    systemd.sockets.guestagent-local.wantedBy = [ "sockets.target" ];
    systemd.sockets.guestagent-credentials.wantedBy = [ "sockets.target" ];
    systemd.sockets.guestagent-report.wantedBy = [ "sockets.target" ];
    systemd.targets.guestagent-credentials.wantedBy = [ "multi-user.target" ];

    # guestagent-credentials.target requires it: with a restart of it, every unit that requires the target would be
    # restarted too, and wait for the host.
    systemd.services.guestagent-pull.restartIfChanged = false;

    systemd.services.guestagent = {
      # By default a switch stops a changed service, and stops and starts the socket of the same name
      # (switch-to-configuration-ng, handle_modified_unit). If another of our sockets has started the service again by
      # then, systemd does not start guestagent.socket (socket_start: "already active, refusing"). A restart leaves the
      # sockets alone, and systemd keeps the connections of waiting units over it. A socket unit that changed is left as
      # it is, so that there is nothing to say for those.
      stopIfChanged = false;
      # The agent reads its configuration only when it starts, and does not end while a unit waits.
      restartTriggers = [ configFile ];
    };

    # PID 1 imports OEM strings and fw_cfg in the initrd, and loads these there if the initrd has them.
    boot.initrd.availableKernelModules = [
      "dmi_sysfs"
      "qemu_fw_cfg"
      "vmw_vsock_virtio_transport"
    ];
    # Not dmi_sysfs: where the VM has no SMBIOS it cannot be loaded, which would fail systemd-modules-load.service. PID 1
    # tries it by itself, and the agent reads the table without it.
    boot.kernelModules = [ "vmw_vsock_virtio_transport" ];
  };
}
