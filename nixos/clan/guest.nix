# A clan machine that lives in the VM of an instance, as a NixOS module.
{
  instanceName,
  machineName,
  settings,
  # The settings of the machine that runs the VM.
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
  imports = [
    ../module.nix
  ]
  ++ map (server: import ./vm.nix { settings = server; }) servers;

  config = lib.mkMerge [
    {
      assertions = [
        {
          assertion = isVM;
          message = "clan instance ${instanceName}: ${machineName} has role guest, and is no VM of microvm.nix. The machine that runs VMs has role server: write roles.server.machines.${machineName}.settings. A machine that lives in a VM imports inputs.microvm.nixosModules.microvm";
        }
        {
          assertion = lib.length servers <= 1;
          message = "clan instance ${instanceName}: ${toString (lib.length servers)} machines with role server have guest = \"${machineName}\". It lives in one VM: leave it out in the settings of the others";
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
