# snippets.nix FILE: evaluates a Nix snippet of the documentation, and is "ok". The snippet is a whole file, and its name says
# whose: web.nix is a guest's configuration, host.nix the host's, flake.nix the flake that has it. Of a clan, microvm.nix has
# the instances, and configuration.nix is the machine's.
file:
let
  lib = import ./mini/lib.nix;
  inherit (lib) mkOption types;

  packages =
    self:
    lib.genAttrs [
      "replace-secret"
      "shadow"
    ] (name: self.hello // { pname = name; });
  nixos =
    modules:
    import ./mini/nixos.nix {
      inherit modules;
      pkgsExtra = packages;
    };

  str = mkOption { type = types.str; };
  strOr =
    default:
    mkOption {
      type = types.str;
      inherit default;
    };
  flag = mkOption {
    type = types.bool;
    default = false;
  };
  attrsOf =
    options:
    mkOption {
      type = types.attrsOf (types.submodule options);
      default = { };
    };

  # What snippets set of nixpkgs, sops-nix and agenix, with their names and types. The units are what these make of it, as far
  # as that matters.
  nixpkgs =
    { config, ... }:
    {
      options.services = {
        nginx.virtualHosts = attrsOf {
          options = {
            addSSL = flag;
            sslCertificate = mkOption { type = types.path; };
            sslCertificateKey = mkOption { type = types.path; };
          };
        };
        restic.backups = attrsOf {
          options = {
            passwordFile = str;
            paths = mkOption { type = types.listOf types.str; };
            repository = str;
          };
        };
        openssh = {
          enable = flag;
          hostKeys = mkOption {
            type = types.listOf types.attrs;
            default = [ { path = "/etc/ssh/ssh_host_ed25519_key"; } ];
          };
          extraConfig = mkOption {
            type = types.lines;
            default = "";
          };
        };
      };
      config.systemd.services = {
        nginx = lib.mkIf (config.services.nginx.virtualHosts != { }) {
          serviceConfig.ExecStart = "nginx ${
            toString (
              map (host: "${toString host.sslCertificate} ${host.sslCertificateKey}") (
                lib.attrValues config.services.nginx.virtualHosts
              )
            )
          }";
        };
        sshd = lib.mkIf config.services.openssh.enable {
          serviceConfig.ExecStart = "sshd ${config.services.openssh.extraConfig}";
        };
      }
      // lib.mapAttrs' (
        name: backup:
        lib.nameValuePair "restic-backups-${name}" {
          environment.RESTIC_PASSWORD_FILE = backup.passwordFile;
          serviceConfig.ExecStart = "restic ${backup.repository} ${toString backup.paths}";
        }
      ) config.services.restic.backups;
    };
  sops =
    { config, ... }:
    {
      options.sops = {
        useSystemdActivation = flag;
        age.keyFile = mkOption {
          type = types.nullOr types.str;
          default = null;
        };
        secrets = attrsOf (
          { name, ... }:
          {
            options = {
              path = strOr "/run/secrets/${name}";
              restartUnits = mkOption {
                type = types.listOf types.str;
                default = [ ];
              };
            };
          }
        );
      };
      config.systemd.services.sops-install-secrets = lib.mkIf config.sops.useSystemdActivation {
        serviceConfig.ExecStart = "sops-install-secrets ${config.sops.age.keyFile}";
      };
    };
  agenix.options.age.secrets = attrsOf (
    { name, ... }:
    {
      options = {
        file = mkOption { type = types.path; };
        path = strOr "/run/agenix/${name}";
      };
    }
  );

  flake = (import ../../flake.nix).outputs {
    self.outPath = toString ../..;
    nixpkgs = {
      inherit lib;
      legacyPackages = { };
    };
  };
  guest = [
    nixpkgs
    sops
    flake.nixosModules.guest
    { services.guestagent.enable = true; }
    file
  ];
  host = [
    sops
    agenix
    ./microvm.nix
    flake.nixosModules.host
    # The VM that snippets go on about without saying what it is.
    { microvm.vms.web.config = lib.mkDefault { microvm.vsock.cid = 3; }; }
    file
  ];
  inherit (import ./clan-core.nix { inherit lib nixos; }) machineWith;
  # The folder of a clan whose file is at inventory/services/microvm.nix, or machines/NAME/configuration.nix.
  clanFolder = builtins.dirOf (builtins.dirOf (builtins.dirOf file));
  clan =
    folder: instances:
    let
      machine =
        more:
        machineWith (
          {
            hasMicrovm = false;
            instances = lib.mapAttrs (
              _: instance:
              # clan takes a service from the input of that name.
              assert !(instance ? module) || (inputs.${instance.module.input}).clan.modules ? ${instance.module.name};
              instance
            ) instances;
          }
          // more
        );
      inputs = {
        guestagent = flake;
        microvm.nixosModules.host = ./microvm.nix;
      };
      web = machine {
        name = "web";
        isVM = true;
      };
    in
    machine {
      name = "britton-desktop";
      modules = [
        # Arguments that an import depends on are none of _module.args.
        (
          { pkgs, ... }:
          import (folder + "/machines/britton-desktop/configuration.nix") { inherit inputs pkgs; }
        )
        { _module.args.self.nixosConfigurations = { inherit web; }; }
      ];
    };
  # What an instance that is shown in part leaves out.
  instance.test-vm.roles.server.machines.britton-desktop.settings.vsockCid = 3;

  isClan = (import file).inputs ? clan-core;
  system =
    {
      "web.nix" = nixos guest;
      "host.nix" = nixos host;
      "microvm.nix" = clan clanFolder (lib.recursiveUpdate instance (import file).instances);
      "configuration.nix" = clan clanFolder instance;
      "flake.nix" =
        if isClan then
          ((import file).outputs {
            self = { };
            clan-core.lib.clan =
              { inventory, ... }:
              # It is the one that the tests go on about.
              assert
                inventory.instances.test-vm.roles.server.machines
                == (import ../../nixos/clan/tests/test-vm.nix).instance.roles.server.machines;
              {
                config = {
                  nixosConfigurations.britton-desktop = clan (builtins.dirOf file) inventory.instances;
                  clanInternals = { };
                };
              };
          }).nixosConfigurations.britton-desktop
        else
          ((import file).outputs {
            guestagent = flake;
            microvm.nixosModules.host = ./microvm.nix;
            nixpkgs.lib.nixosSystem = { modules, system }: nixos modules;
          }).nixosConfigurations.host;
    }
    .${baseNameOf file};
  # With what would be built of it: its units, and its files in /etc.
  whole =
    { config, ok, ... }:
    assert ok;
    [
      (lib.mapAttrsToList (_: unit: unit.text) config.systemd.units)
      (lib.mapAttrsToList (
        _: entry: if entry.text != null then entry.text else toString entry.source
      ) config.environment.etc)
      (map (vm: whole (if vm.evaluatedConfig == null then vm.config else vm.evaluatedConfig)) (
        lib.attrValues (config.microvm.vms or { })
      ))
    ];
in
builtins.deepSeq (whole system) "ok"
