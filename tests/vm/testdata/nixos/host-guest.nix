# The modules of a guest of host.nix, by its name, that are not in its own file: the options that microvm.nix has in a
# guest, and what the host's module adds.
name:
let
  host = import ../../../nix/mini/nixos.nix {
    modules = [
      ../../../../nixos/host.nix
      ../../../nix/microvm.nix
      ./host.nix
    ];
  };
in
[
  (
    { lib, ... }:
    {
      options.microvm = {
        hypervisor = lib.mkOption { type = lib.types.str; };
        vsock.cid = lib.mkOption { type = lib.types.int; };
        cloud-hypervisor.package = lib.mkOption { type = lib.types.unspecified; };
        extraArgsScript = lib.mkOption {
          type = lib.types.nullOr lib.types.str;
          default = null;
        };
      };
    }
  )
]
++ host.config.microvm.vms.${name}.extraModules
