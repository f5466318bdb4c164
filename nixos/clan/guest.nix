# A clan machine that lives in the VM of an instance, as a NixOS module.
{
  instanceName,
  machineName,
  settings,
  # The machine that runs the VM: its name, with its settings.
  servers,
}:
{
  config,
  lib,
  options,
  ...
}:
let
  hasMicrovm = options ? microvm.guest;
  isVM = hasMicrovm && config.microvm.guest.enable;
  inherit (config.microvm) hypervisor vsock;
  hasSocket = lib.elem hypervisor [
    "cloud-hypervisor"
    "firecracker"
  ];
in
{
  _file = "clan instance ${instanceName}, roles.guest.machines.${machineName}";
  imports = [
    ../module.nix
  ]
  ++ map (server: {
    _file = "clan instance ${instanceName}, roles.server.machines.${server}.settings";
    imports = [ (import ./vm.nix { settings = servers.${server}; }) ];
  }) (builtins.attrNames servers);

  config = lib.mkMerge [
    {
      assertions = [
        {
          assertion = isVM;
          message = "clan instance ${instanceName}: ${machineName} has role guest, and is no VM of microvm.nix. The machine that runs VMs has role server: write roles.server.machines.${machineName}.settings. A machine that lives in a VM imports inputs.microvm.nixosModules.microvm";
        }
        {
          assertion = lib.length (lib.attrNames servers) <= 1;
          message = "clan instance ${instanceName}: ${toString (lib.length (lib.attrNames servers))} machines with role server have guest = \"${machineName}\". It lives in one VM: leave it out in the settings of the others";
        }
      ];
    }
    (lib.mkIf isVM {
      services.guestagent = {
        # There are no settings, and clan refuses those that somebody made only when they are asked for.
        enable = builtins.seq settings (lib.mkDefault true);
        # Where the host's module has the provider listen. It asserts so.
        provider.address = lib.mkIf (!hasSocket && vsock.cid != null) (
          lib.mkDefault "vsock:2:${toString (768 + lib.mod (lib.max 3 vsock.cid) 254)}"
        );
      };
    })
  ];
}
