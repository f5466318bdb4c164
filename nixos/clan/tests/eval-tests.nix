# Tests for nix-unit in clan's manner, with the real clan-core and microvm.nix. Both are inputs of a flake that has
#
#   imports = [
#     (clan-core.clanLib.test.flakeModules.makeEvalChecks {
#       module = ./nixos/clan;
#       testName = "microvm";
#       tests = ./nixos/clan/tests/eval-tests.nix;
#       testArgs = { inherit (inputs) microvm; };
#       ...
#     })
#   ];
#
# tests/nix/clan.nix has many more, which need neither.
{
  module,
  clanLib,
  microvm,
  ...
}:
let
  testVM = import ./test-vm.nix;

  clanWith =
    instance: machines:
    let
      clan = clanLib.clan {
        # As a flake has them.
        self = { inherit (clan.config) nixosConfigurations; };
        directory = ./..;
        modules.microvm = module;
        machines = {
          britton-desktop = {
            imports = [
              microvm.nixosModules.host
              testVM.machine
            ];
            nixpkgs.hostPlatform = "x86_64-linux";
          };
        }
        // machines;
        # With another name than its VM.
        inventory.instances.example = {
          module.name = "microvm";
          module.input = "self";
        }
        // instance;
      };
    in
    clan;
  configOf = clan: clan.config.nixosConfigurations.britton-desktop.config;
  failedOf =
    config: map (a: a.message) (builtins.filter (a: !a.assertion) config.assertions);

  testClan = clanWith { inherit (testVM.instance) roles; } { };
  config = configOf testClan;
  guest = config.microvm.vms.test-vm.config.config;
  settings = testVM.instance.roles.server.machines.britton-desktop.settings;

  refused = settings: configOf (clanWith { roles.server.machines.britton-desktop = settings; } { });
in
{
  test_test_vm = {
    # For nix repl
    inherit testClan;
    expr = failedOf config ++ failedOf guest ++ config.warnings;
    expected = [ ];
  };

  test_settings = {
    expr = {
      inherit (config.microvm.vms.test-vm) autostart;
      inherit (guest.microvm) hypervisor mem vcpu;
      vsockCid = guest.microvm.vsock.cid;
      interfaces = map (i: { inherit (i) id mac type; }) guest.microvm.interfaces;
      staticOemStrings = guest.microvm.cloud-hypervisor.platformOEMStrings;
      enableSsh = guest.services.openssh.enable;
    };
    expected = {
      inherit (settings)
        autostart
        enableSsh
        hypervisor
        interfaces
        mem
        staticOemStrings
        vcpu
        vsockCid
        ;
    };
  };

  test_credentials = {
    expr = builtins.attrNames config.services.guestagent.vms.test-vm.credentials;
    expected = [
      "HOST-API-KEY"
      "HOST-DB-PASSWORD"
      "HOST-JWT-SECRET"
      "root-password"
    ];
  };

  test_restart_units = {
    expr = config.clan.core.vars.generators.test-vm-secrets.files.api-key.restartUnits;
    expected = [ "guestagent-provide@test-vm.service" ];
  };

  test_hardening = {
    expr = {
      inherit (config.systemd.services."microvm@test-vm".serviceConfig)
        NoNewPrivileges
        ProcSubset
        ProtectProc
        RestrictAddressFamilies
        ;
    };
    expected = {
      NoNewPrivileges = true;
      ProcSubset = "pid";
      ProtectProc = "invisible";
      RestrictAddressFamilies = [
        "AF_UNIX"
        "AF_VSOCK"
        "AF_INET"
        "AF_INET6"
      ];
    };
  };

  # The converter throws at a type that it does not know.
  test_json_schema = {
    expr = builtins.attrNames (
      builtins.fromJSON (
        builtins.toJSON testClan.config._services.allServices.self-microvm.result.api.schema
      )
    );
    expected = [
      "guest"
      "server"
    ];
  };

  test_guest_machine =
    let
      clan =
        clanWith
          {
            roles.server.machines.britton-desktop.settings = {
              guest = "web";
              vmName = "test-vm";
              vsockCid = 3;
              vcpu = 2;
            };
            roles.guest.machines.web = { };
          }
          {
            web = {
              imports = [ microvm.nixosModules.microvm ];
              nixpkgs.hostPlatform = "x86_64-linux";
            };
          };
    in
    {
      expr = {
        failed = failedOf (configOf clan) ++ failedOf clan.config.nixosConfigurations.web.config;
        inherit (clan.config.nixosConfigurations.web.config.microvm) vcpu;
        inherit ((configOf clan).microvm.vms.test-vm.evaluatedConfig.config.networking) hostName;
        cid = (configOf clan).services.guestagent.vms.test-vm.cid;
      };
      expected = {
        failed = [ ];
        vcpu = 2;
        hostName = "web";
        cid = 3;
      };
    };

  # Said before microvm.nix needs what is not there.
  test_guest_without_role = {
    expr = failedOf (
      configOf (
        clanWith {
          roles.server.machines.britton-desktop.settings = {
            guest = "web";
            vsockCid = 3;
          };
        } { }
      )
    );
    expected = [
      "clan instance example, roles.server.machines.britton-desktop.settings.guest: web has no role guest in this instance. Add roles.guest.machines.web = { }"
    ];
  };

  test_guest_without_microvm = {
    expr = failedOf (
      configOf (
        clanWith
          {
            roles.server.machines.britton-desktop.settings = {
              guest = "web";
              vsockCid = 3;
            };
            roles.guest.machines.web = { };
          }
          {
            web.nixpkgs.hostPlatform = "x86_64-linux";
          }
      )
    );
    expected = [
      "clan instance example, roles.server.machines.britton-desktop.settings.guest: the machine web is no VM of microvm.nix. Import inputs.microvm.nixosModules.microvm in its configuration"
    ];
  };

  test_bridge_of_the_guest = {
    expr =
      (configOf (
        clanWith
          {
            roles.server = {
              machines.britton-desktop.settings = {
                vmName = "test-vm";
                vsockCid = 3;
              };
              extraModules = [
                {
                  microvm.vms.test-vm.extraModules = [
                    {
                      microvm.interfaces = [
                        {
                          type = "bridge";
                          id = "vm-b";
                          mac = "02:00:00:01:01:03";
                          bridge = "br0";
                        }
                      ];
                    }
                  ];
                }
              ];
            };
          }
          { }
      )).systemd.services."microvm@test-vm".serviceConfig ? NoNewPrivileges;
    expected = false;
  };

  test_settings_beside_settings = {
    expr = (refused { vmName = "test-vm"; }).microvm.vms;
    expectedError.msg = "machines.britton-desktop.vmName' does not exist";
  };

  test_config = {
    expr = (refused { config.vmName = "test-vm"; }).microvm.vms;
    expectedError.msg = "machines.britton-desktop.config' does not exist";
  };

  test_function = {
    expr = (refused { settings.guestModules = [ ({ ... }: { }) ]; }).microvm.vms;
    expectedError.msg = "cannot convert a function to JSON";
  };

  test_unknown_setting = {
    expr = (refused { settings.vcpus = 2; }).microvm.vms;
    expectedError.msg = "settings.vcpus' does not exist";
  };

  test_server_as_guest = {
    expr = builtins.length (
      failedOf (
        configOf (
          clanWith {
            roles.guest.machines.britton-desktop.settings.runtimeSecrets.api-key = { };
          } { }
        )
      )
    );
    expected = 1;
  };
}
