# The clan service `microvm`: VMs of microvm.nix as instances of an inventory, with secrets that clan generates.
{ lib, ... }:
let
  vmOf =
    instanceName: settings: if settings.vmName == null then instanceName else settings.vmName;
in
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
          vm = vmOf instanceName settings;
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
          servers = lib.filterAttrs (_: server: server.guest == machine.name) (
            lib.mapAttrs (_: server: server.settings) (roles.server.machines or { })
          );
        };
      };
  };

  # One instance does not see another.
  perMachine =
    { instances, machine, ... }:
    let
      vms = lib.mapAttrs (
        instanceName: instance:
        vmOf instanceName instance.roles.server.machines.${machine.name}.settings
      ) (lib.filterAttrs (_: instance: instance.roles ? server.machines.${machine.name}) instances);
    in
    {
      nixosModule.assertions = lib.mapAttrsToList (
        instanceName: vm:
        let
          others = lib.attrNames (
            lib.filterAttrs (other: its: other != instanceName && its == vm) vms
          );
        in
        {
          assertion = others == [ ];
          message = "clan instance ${instanceName}, roles.server.machines.${machine.name}.settings.vmName: ${vm} is also the VM of the instance ${lib.concatStringsSep ", " others}. Give one of them another vmName";
        }
      ) vms;
    };
}
