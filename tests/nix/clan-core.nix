# What clan does with the service: it checks settings, calls the roles, and gives machines their modules and vars.
{ lib, nixos }:
let
  inherit (lib) mkOption types;

  listOf =
    type:
    mkOption {
      type = types.listOf type;
      default = [ ];
    };

  # clan.core.vars, where sops deploys.
  vars =
    { config, ... }:
    let
      file =
        generator:
        { name, ... }:
        {
          options = {
            deploy = mkOption {
              type = types.bool;
              default = true;
            };
            mode = mkOption {
              type = types.str;
              default = "0400";
            };
            path = mkOption {
              type = types.str;
              default = "/run/secrets/vars/per-machine/${config.networking.hostName}/${generator}/${name}";
            };
            restartUnits = listOf types.str;
            secret = mkOption {
              type = types.bool;
              default = true;
            };
          };
        };
      generator =
        { name, ... }:
        {
          options = {
            files = mkOption { type = types.attrsOf (types.submodule (file name)); };
            prompts = mkOption {
              type = types.attrs;
              default = { };
            };
            runtimeInputs = listOf types.package;
            script = mkOption {
              type = types.either types.str types.path;
              default = "";
            };
          };
        };
    in
    {
      options.clan.core.vars.generators = mkOption {
        type = types.attrsOf (types.submodule generator);
        default = { };
      };
    };

  # A machine with microvm.nix' guest module.
  guests =
    modules:
    (nixos [
      ./microvm.nix
      { microvm.vms.guest.config.imports = modules; }
    ]).config.microvm.vms.guest.config;
in
rec {
  inherit vars;

  service = import ../../nixos/clan { inherit lib; };

  # Settings are JSON, and have what the role's interface has.
  settingsOf =
    role: settings:
    (lib.evalModules {
      modules = [
        service.roles.${role}.interface
        { config = builtins.fromJSON (builtins.toJSON settings); }
      ];
    }).config;

  # The machine of that name: what the inventory's instances make of it, and its own modules.
  machineWith =
    {
      name,
      instances,
      modules ? [ ],
      isVM ? false,
      hasMicrovm ? true,
    }:
    let
      rolesOf =
        instance:
        lib.mapAttrs (role: members: {
          machines = lib.mapAttrs (_: machine: {
            settings = settingsOf role (machine.settings or { });
          }) members.machines;
        }) instance.roles;
      mineOf =
        instance:
        lib.filter (role: instance.roles.${role}.machines ? ${name}) (lib.attrNames instance.roles);
      here = lib.filterAttrs (_: instance: mineOf instance != [ ]) instances;
      modulesOf =
        instanceName: instance:
        let
          roles = rolesOf instance;
          mine = mineOf instance;
        in
        map (
          role:
          (service.roles.${role}.perInstance {
            inherit instanceName roles;
            machine = {
              inherit name;
              roles = mine;
            };
            inherit (roles.${role}.machines.${name}) settings;
          }).nixosModule
        ) mine
        ++ lib.concatMap (role: instance.roles.${role}.extraModules or [ ]) mine;
    in
    (if isVM then guests else nixos) (
      [
        vars
        { networking.hostName = name; }
      ]
      ++ lib.optional (hasMicrovm && !isVM) ./microvm.nix
      ++ lib.optional (here != { }) (service.perMachine {
        machine = {
          inherit name;
          roles = lib.unique (lib.concatMap mineOf (lib.attrValues here));
        };
        instances = lib.mapAttrs (_: instance: { roles = rolesOf instance; }) here;
      }).nixosModule
      ++ lib.concatLists (lib.mapAttrsToList modulesOf instances)
      ++ modules
    );
}
