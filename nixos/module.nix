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
in
{
  options.services.guestagent = {
    enable = lib.mkEnableOption "guestagent, which installs the credentials that the host gives this VM";

    package = lib.mkOption {
      type = lib.types.package;
      default = pkgs.callPackage ./package.nix { };
      defaultText = lib.literalExpression "pkgs.callPackage ./package.nix { }";
      description = "The package with the agent and its units.";
    };

    settings.smbios.read = lib.mkOption {
      type = lib.types.enum [
        "auto"
        "always"
        "never"
      ];
      default = "auto";
      description = ''
        Whether to read credentials from SMBIOS OEM strings. `auto` reads them unless this is a confidential VM: there
        the host, who writes them, is not trusted. `always` reads them there too, `never` reads them nowhere.
      '';
    };
  };

  options.services.guestagent.settings.peer.privilegedPort = lib.mkOption {
    type = lib.types.enum [
      "required"
      "ignored"
    ];
    default = "required";
    description = ''
      Whether the host has to call from a port below 1024, which only its root can. `ignored` is for VMMs that show vsock
      as a Unix socket (cloud-hypervisor, Firecracker, vhost-device-vsock): they choose the port, and the permissions of
      that socket are the guard.
    '';
  };

  options.services.guestagent.settings.names.allow = lib.mkOption {
    type = lib.types.listOf lib.types.str;
    default = [ ];
    example = [ "ssh.*" ];
    description = ''
      Names, or prefixes that end in `*`, that the host may set while the guest runs although systemd itself acts on them.
    '';
  };

  config = lib.mkIf cfg.enable {
    environment.etc."guestagent/config.json".source =
      json.generate "guestagent-config.json" cfg.settings;
    environment.systemPackages = [ cfg.package ];

    # NixOS takes the units from the package but ignores their [Install] sections. run-credstore.mount needs none: the
    # import pulls it in.
    systemd.packages = [ cfg.package ];
    systemd.services.guestagent-import.wantedBy = [ "sysinit.target" ];
    systemd.sockets.guestagent.wantedBy = [ "sockets.target" ];
    systemd.sockets.guestagent-local.wantedBy = [ "sockets.target" ];
    systemd.sockets.guestagent-credentials.wantedBy = [ "sockets.target" ];

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
