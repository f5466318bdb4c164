# The clan service `microvm`: VMs of microvm.nix as instances of an inventory, with secrets that clan generates.
{ lib, ... }:
{
  _class = "clan.service";
  manifest.name = "guestagent/microvm";
  manifest.description = "VMs of microvm.nix, with secrets that clan generates and that change while the VMs run";
  manifest.categories = [ "System" ];
  manifest.readme = builtins.readFile ./README.md;

  roles.server = {
    description = "A machine that runs a VM, and hands it its secrets";
    interface = ./interface.nix;
    perInstance =
      {
        instanceName,
        machine,
        roles,
        settings,
        ...
      }:
      {
        nixosModule = import ./server.nix {
          inherit instanceName settings;
          machineName = machine.name;
          vm = if settings.vmName == null then instanceName else settings.vmName;
          guests = lib.attrNames (roles.guest.machines or { });
        };
      };
  };

  roles.guest = {
    description = "A clan machine that lives in a VM, which the server's settings name and describe";
    # What there is to say of the VM, the server's settings say.
    interface = { };
    perInstance =
      {
        instanceName,
        machine,
        roles,
        settings,
        ...
      }:
      {
        nixosModule = import ./guest.nix {
          inherit instanceName settings;
          machineName = machine.name;
          servers = lib.filter (server: server.guest == machine.name) (
            map (server: server.settings) (lib.attrValues (roles.server.machines or { }))
          );
        };
      };
  };
}
