# What the project's modules touch of microvm.nix: of its host's module, and of the options that its guests have.
{
  lib,
  pkgs,
  ...
}:

let
  inherit (lib) mkOption types;

  guest = {
    # NixOS's own, which the clan service sets.
    options.services.openssh.enable = mkOption {
      type = types.bool;
      default = false;
    };
    options.microvm = {
      hypervisor = mkOption {
        type = types.enum [
          "alioth"
          "cloud-hypervisor"
          "crosvm"
          "firecracker"
          "kvmtool"
          "qemu"
          "stratovirt"
          "vfkit"
        ];
        default = "qemu";
      };
      vsock.cid = mkOption {
        type = types.nullOr types.int;
        default = null;
      };
      extraArgsScript = mkOption {
        type = types.nullOr types.str;
        default = null;
      };
      qemu.machine = mkOption {
        type = types.str;
        default = "microvm";
      };
      guest.enable = mkOption {
        type = types.bool;
        default = true;
      };
      vcpu = mkOption {
        type = types.ints.positive;
        default = 1;
      };
      mem = mkOption {
        type = types.ints.positive;
        default = 512;
      };
      interfaces = mkOption {
        type = types.listOf types.attrs;
        default = [ ];
      };
      vsock.ssh.enable = mkOption {
        type = types.bool;
        default = false;
      };
      qemu.extraArgs = mkOption {
        type = types.listOf types.str;
        default = [ ];
      };
      cloud-hypervisor.platformOEMStrings = mkOption {
        type = types.listOf types.str;
        default = [ ];
      };
      cloud-hypervisor.package = mkOption {
        type = types.package;
        default = pkgs.hello // {
          pname = "cloud-hypervisor";
          version = "48.0";
        };
        description = "As there, where no other module can describe it.";
      };
    };
  };

in
{
  options.microvm = {
    host.enable = mkOption {
      type = types.bool;
      default = true;
    };
    stateDir = mkOption {
      type = types.path;
      default = "/var/lib/microvms";
    };
    vms = mkOption {
      type = types.attrsOf (
        types.submodule (
          { name, config, ... }:
          {
            options = {
              config = mkOption {
                type = types.nullOr (
                  types.raw
                  // {
                    merge =
                      _: definitions:
                      import ./mini/nixos.nix {
                        modules = [
                          guest
                          { networking.hostName = lib.mkDefault name; }
                        ]
                        ++ map (definition: definition.value) definitions
                        ++ config.extraModules;
                      };
                  }
                );
                default = null;
              };
              extraModules = mkOption {
                type = types.listOf types.deferredModule;
                default = [ ];
              };
              evaluatedConfig = mkOption {
                type = types.nullOr types.unspecified;
                default = null;
              };
              flake = mkOption {
                type = types.nullOr types.path;
                default = null;
              };
              autostart = mkOption {
                type = types.bool;
                default = true;
              };
            };
          }
        )
      );
      default = { };
      description = "The VMs, as there.";
    };
  };
}
