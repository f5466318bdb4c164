# The clan service: what comes of its settings, with a stand-in for clan. nixos/clan/tests/eval-tests.nix is for the real one.
{ lib, nixos }:
let
  inherit (import ./clan-core.nix { inherit lib nixos; })
    machineWith
    service
    settingsOf
    vars
    ;
  testVM = import ../../nixos/clan/tests/test-vm.nix;

  # A machine of one instance.
  machineOf =
    args@{
      instanceName ? "test-vm",
      roles,
      ...
    }:
    machineWith (
      {
        name = "britton-desktop";
        instances.${instanceName} = { inherit roles; };
      }
      // removeAttrs args [
        "instanceName"
        "roles"
      ]
    );

  server =
    settings:
    machineOf {
      roles.server.machines.britton-desktop = { inherit settings; };
      modules = [ testVM.machine ];
    };
  # The least that has a provider.
  small = settings: server ({ vsockCid = 3; } // settings);
  # What is refused, and by what message.
  refused = settings: message: {
    value = (small settings).ok;
    inherit message;
  };

  # The instance has another name than its VM.
  seed = machineOf {
    instanceName = "example";
    inherit (testVM.instance) roles;
    modules = [ testVM.machine ];
  };
  inherit (seed.config.microvm.vms) test-vm;
  guestOf = machine: machine.config.microvm.vms.test-vm.config.config;
  guest = guestOf seed;
  providerOf = machine: machine.config.systemd.services."guestagent-provide@test-vm";
  hardeningOf = machine: machine.config.systemd.services."microvm@test-vm".serviceConfig;
  inherit (seed.config.clan.core.vars) generators;
  var = generator: file: "/run/secrets/vars/per-machine/britton-desktop/${generator}/${file}";
  inherit (testVM.instance.roles.server.machines.britton-desktop) settings;

  secret = small { runtimeSecrets.api-key.oemCredentialName = "API_KEY"; };
  secretGenerator = secret.config.clan.core.vars.generators.microvm-test-vm-api-key;

  strings =
    hypervisor: extra:
    let
      machine = small {
        inherit hypervisor;
        staticOemStrings = [
          "io.systemd.credential:ENVIRONMENT=a,b"
          "io.systemd.credential.binary:CLUSTER=YnJpdHRvbg=="
        ];
        guestModules = [ extra ];
      };
    in
    assert machine.ok;
    guestOf machine;
  onCommandLine =
    config:
    config.boot.kernelParams == [
      "systemd.set_credential=ENVIRONMENT:a,b"
      "systemd.set_credential_binary=CLUSTER:YnJpdHRvbg=="
    ]
    && config.microvm.qemu.extraArgs == [ ]
    && config.microvm.cloud-hypervisor.platformOEMStrings == [ ];

  # The same VM as a machine of the clan, and the host that runs it. Another host of the instance runs another.
  inMachine =
    {
      hypervisor ? "qemu",
      isVM ? true,
      modules ? [ ],
      more ? { },
    }:
    let
      roles = {
        server.machines.britton-desktop.settings = {
          guest = "web";
          vsockCid = 300;
          inherit hypervisor;
          vcpu = 2;
          rootPassword = true;
        }
        // more;
        server.machines.other.settings = {
          guest = "db";
          vcpu = 4;
        };
        guest.machines.web = { };
        guest.machines.db = { };
      };
      web = machineOf {
        name = "web";
        inherit isVM roles modules;
      };
    in
    {
      inherit web;
      host = machineOf {
        inherit roles;
        modules = [ { _module.args.self.nixosConfigurations = { inherit web; }; } ];
      };
    };
  machine = inMachine { };

  bridge = [
    {
      type = "bridge";
      id = "vm-b";
      mac = "02:00:00:01:01:03";
      bridge = "br0";
    }
  ];
  # Without what takes a bridge's helper its capability.
  leavesHelper =
    machine:
    let
      h = hardeningOf machine;
    in
    machine.ok
    && !(h ? NoNewPrivileges)
    && !(h ? RestrictAddressFamilies)
    && !(h ? CapabilityBoundingSet)
    && h.ProtectProc == "invisible";

  # Every option of the interface, submodules' too.
  optionsIn =
    tree:
    lib.concatMap (
      name:
      let
        value = tree.${name};
      in
      if name == "_module" then
        [ ]
      else if value._type or "" != "option" then
        optionsIn value
      else
        [ value ] ++ (if value.type ? getSubOptions then optionsIn (value.type.getSubOptions value.loc) else [ ])
    ) (lib.attrNames tree);
  interface = optionsIn (lib.evalModules { modules = [ service.roles.server.interface ]; }).options;

  # What the guides' machine had before, and has again after a rollback.
  direct = {
    microvm.vms.test-vm.config.microvm.vsock.cid = 3;
    systemd.services."microvm@test-vm".serviceConfig.LoadCredential = [
      "host-api-key:${var "test-vm-secrets" "api-key"}"
    ];
  };
  refusals = {
    "clan: unknown settings" = {
      value = settingsOf "server" { vcpus = 2; };
      message = "The option `vcpus' does not exist";
    };
    "clan: settings beside `settings`" = {
      value = settingsOf "server" { config.vcpu = 2; };
      message = "The option `config' does not exist";
    };
    "clan: functions in guestModules" = {
      value = settingsOf "server" { guestModules = [ ({ pkgs, ... }: { }) ]; };
      message = "cannot convert a function to JSON";
    };
    "clan: guestModules that are no values" = refused { guestModules = [ "./web.nix" ]; } "Put the module into roles.server.extraModules, as { microvm.vms.test-vm.extraModules = [ … ]; }";
    "clan: guestModules of a VM that has its own configuration" = {
      value = (inMachine { more.guestModules = [ { } ]; }).host.ok;
      message = "the VM is the machine web, which has a configuration of its own";
    };
    "clan: a guest that is none" = refused { guest = "web"; } "Add roles.guest.machines.web = { }";
    "clan: a guest that is no VM of microvm.nix" = {
      value = (inMachine { isVM = false; }).host.ok;
      message = "settings.guest: the machine web is no VM of microvm.nix. Import inputs.microvm.nixosModules.microvm in its configuration";
    };
    "clan: a guest that the clan has no machine for" = {
      value =
        (machineOf {
          roles.server.machines.britton-desktop.settings = {
            guest = "web";
            vsockCid = 3;
          };
          roles.guest.machines.web = { };
          modules = [ { _module.args.self.nixosConfigurations = { }; } ];
        }).ok;
      message = "the machine web is no VM of microvm.nix";
    };
    "clan: two instances with one VM" = {
      value =
        (machineWith {
          name = "britton-desktop";
          instances = {
            test-vm.roles.server.machines.britton-desktop.settings.vsockCid = 3;
            copy.roles.server.machines.britton-desktop.settings.vmName = "test-vm";
          };
        }).ok;
      message = "clan instance test-vm, roles.server.machines.britton-desktop.settings.vmName: test-vm is also the VM of the instance copy. Give one of them another vmName";
    };
    "clan: a hypervisor without vsock" = {
      value = (settingsOf "server" { hypervisor = "stratovirt"; }).hypervisor;
      message = "`hypervisor' is not of type";
    };
    "clan: a password" = refused { rootPassword = "test"; } "Write rootPassword = true";
    "clan: a credential from nowhere" =
      refused { credentials.api-key = { }; } "it comes from nowhere. Set source to a path on britton-desktop, or generator";
    "clan: a credential from two places" = refused {
      credentials.key = {
        source = "/etc/secrets/key";
        generator = "test-vm-secrets";
      };
    } "source and generator are both set";
    "clan: a generator that is not declared" =
      refused { credentials.api-key.generator = "test-vm-secret"; } "britton-desktop has no generator test-vm-secret. Declare clan.core.vars.generators.\"test-vm-secret\" with the file api-key";
    "clan: a var that is not deployed" = {
      value =
        (machineOf {
          roles.server.machines.britton-desktop.settings = {
            vsockCid = 3;
            credentials.api-key.generator = "test-vm-secrets";
          };
          modules = [
            testVM.machine
            { clan.core.vars.generators.test-vm-secrets.files.api-key.deploy = false; }
          ];
        }).ok;
      message = "settings.credentials.api-key: the file api-key of the generator test-vm-secrets has deploy = false, so that it is not on britton-desktop. Leave that out where the generator is declared, or name another file";
    };
    "clan: two credentials of one name" = refused {
      credentials.key.source = "/etc/secrets/key";
      credentialPrefix = "";
      runtimeSecrets.key = { };
    } "two credentials would be key in the guest";
    "clan: a string that is no credential" =
      refused { staticOemStrings = [ "ENVIRONMENT=test" ]; } "ENVIRONMENT=test is no credential. Write io.systemd.credential:NAME=VALUE";
    "clan: a string that no kernel command line has" =
      refused { staticOemStrings = [ "io.systemd.credential:MOTD=hello there" ]; } "this VM has no SMBIOS. Write io.systemd.credential.binary:NAME=BASE64";
    "clan: a string that cloud-hypervisor does not pass on" = refused {
      hypervisor = "cloud-hypervisor";
      staticOemStrings = [ "io.systemd.credential:LIST=a,b" ];
    } "which cloud-hypervisor cannot pass on";
    "clan: a credential that the guest has under another name" = refused {
      credentials.api-key = {
        generator = "test-vm-secrets";
        destination = "API-KEY";
      };
      guestModules = [ { services.guestagent.credentials.API-KEY.services = [ "web" ]; } ];
    } "the guest requires API-KEY";
    "clan: a source that is no path" =
      refused { credentials.api-key.source = "secrets/api-key"; } "it is not an absolute path";
    "clan: a CID that another VM has" = {
      value =
        (machineOf {
          roles.server.machines.britton-desktop.settings.vsockCid = 3;
          modules = [ { microvm.vms.other.config.microvm.vsock.cid = 3; } ];
        }).ok;
      message = "3 is also that of other";
    };
    "clan: a setting that the guest's configuration contradicts" = {
      value =
        (guestOf (small {
          vcpu = 2;
          guestModules = [ { microvm.vcpu = 3; } ];
        })).microvm.vcpu;
      message = "has conflicting definition values (in clan instance test-vm, roles.server.machines.britton-desktop.settings.guestModules, clan instance test-vm, roles.server.machines.britton-desktop.settings)";
    };
    "clan: no CID" = {
      value = (server { }).ok;
      message = "Set microvm.vsock.cid";
    };
    "clan: secrets on the command line that nobody asked for" = refused {
      hypervisor = "cloud-hypervisor";
      bootCredentials = true;
      runtimeSecrets.key = { };
    } "cloud-hypervisor takes OEM strings from its command line only";
    "clan: no microvm.nix on the server" = {
      value =
        (machineOf {
          hasMicrovm = false;
          roles.server.machines.britton-desktop.settings.vsockCid = 3;
        }).ok;
      message = "Import inputs.microvm.nixosModules.host";
    };
    "clan: role guest on the machine that runs VMs" = {
      value =
        (machineOf {
          roles.guest.machines.britton-desktop.settings.runtimeSecrets.api-key.oemCredentialName = "API_KEY";
        }).ok;
      message = "britton-desktop has role guest, and is no VM of microvm.nix. The machine that runs VMs has role server: write roles.server.machines.britton-desktop.settings";
    };
    "clan: settings of a guest" = {
      value =
        (machineOf {
          name = "web";
          isVM = true;
          roles.guest.machines.web.settings.vcpu = 2;
        }).config.services.guestagent.enable;
      message = "The option `vcpu' does not exist";
    };
    "clan: a guest in two VMs" = {
      value =
        (machineOf {
          name = "web";
          isVM = true;
          roles = {
            server.machines.one.settings.guest = "web";
            server.machines.two.settings.guest = "web";
            guest.machines.web = { };
          };
        }).ok;
      message = "2 machines with role server have guest = \"web\"";
    };
  };

  # What microvm@test-vm is shut in by.
  hardening = {
    CapabilityBoundingSet = "";
    KeyringMode = "private";
    LimitCORE = 0;
    LockPersonality = true;
    NoNewPrivileges = true;
    PrivateTmp = true;
    ProcSubset = "pid";
    ProtectControlGroups = true;
    ProtectHome = true;
    ProtectHostname = true;
    ProtectKernelLogs = true;
    ProtectKernelModules = true;
    ProtectKernelTunables = true;
    ProtectProc = "invisible";
    ProtectSystem = "full";
    RestrictAddressFamilies = [
      "AF_UNIX"
      "AF_VSOCK"
      "AF_INET"
      "AF_INET6"
    ];
    RestrictRealtime = true;
    RestrictSUIDSGID = true;
    SystemCallArchitectures = "native";
  };

  # What docs/clan.md has of the messages, each with the case that prints it.
  guide = builtins.readFile ../../docs/clan.md;
  guideLines = lib.filter lib.isString (builtins.split "\n" guide);
  explained = {
    "a credential from nowhere" = "settings.credentials.api-key: it comes from nowhere.";
    "a generator that is not declared" = "settings.credentials.api-key: britton-desktop has no generator test-vm-secret.";
    "a password" = "settings.rootPassword: this is the password itself,";
    "functions in guestModules" = "cannot convert a function to JSON";
    "guestModules that are no values" = "settings.guestModules: settings are JSON, which has no functions, paths or packages.";
    "no CID" = "services.guestagent.vms.test-vm: nothing says how the guest is reached.";
    "no microvm.nix on the server" = "clan instance test-vm: britton-desktop has no microvm.nix, which runs the VM.";
    "role guest on the machine that runs VMs" = "clan instance test-vm: britton-desktop has role guest, and is no VM of microvm.nix.";
    "secrets on the command line that nobody asked for" = "services.guestagent.vms.test-vm.boot.credentials: cloud-hypervisor takes OEM strings from its command line only,";
    "a credential that the guest has under another name" = "services.guestagent.vms.test-vm.credentials: the guest requires API-KEY, which nobody hands over.";
    "a guest that is no VM of microvm.nix" = "settings.guest: the machine web is no VM of microvm.nix.";
    "a var that is not deployed" = "settings.credentials.api-key: the file api-key of the generator test-vm-secrets has deploy = false,";
    "two instances with one VM" = "settings.vmName: test-vm is also the VM of the instance copy.";
    "a source that is no path" = "services.guestagent.vms.test-vm.credentials.HOST-api-key.source: it is not an absolute path.";
    "a CID that another VM has" = "services.guestagent.vms.test-vm.cid: 3 is also that of other,";
  };
  # What nix eval prints, as in the table that has it.
  prints =
    command: value:
    lib.elem "| `nix eval --json .#${command}` | `${builtins.toJSON value}` |" guideLines;
in
{
  holds = lib.mapAttrs' (
    name: message: lib.nameValuePair "clan: docs: ${name}" (lib.hasInfix message guide)
  ) explained // {
    "clan: docs: what systemctl shows of the provider" =
      lib.filter (lib.hasPrefix "    LoadCredential=") guideLines
      == map (line: "    LoadCredential=${line}") (providerOf seed).serviceConfig.LoadCredential;
    "clan: docs: what systemctl shows of the VM" = lib.hasInfix "\n\n${
      lib.concatMapStringsSep "\n" (line: "    ${line}") (
        lib.concatLists (
          lib.mapAttrsToList (
            name: value:
            map (
              value: "${name}=${if value == true then "true" else toString value}"
            ) (lib.toList value)
          ) (hardeningOf seed)
        )
      )
    }\n\n" guide;
    "clan: docs: what nix eval prints" =
      let
        machine = "nixosConfigurations.britton-desktop.config";
        # By the name that it has there.
        inventory.instances.test-vm = testVM.instance;
      in
      prints "clan.inventory.instances --apply builtins.attrNames" (
        lib.attrNames inventory.instances
      )
      && prints "clan.inventory.instances.test-vm.module" inventory.instances.test-vm.module
      && prints "${machine}.microvm.vms --apply builtins.attrNames" (
        lib.attrNames seed.config.microvm.vms
      )
      &&
        prints "${machine}.services.guestagent.vms.test-vm.credentials --apply builtins.attrNames"
          (lib.attrNames seed.config.services.guestagent.vms.test-vm.credentials);

    "clan: a service of clan's, and what each part is for" =
      service._class == "clan.service"
      && lib.attrNames service.roles == [
        "guest"
        "server"
      ]
      && lib.all (role: role.description != "") (lib.attrValues service.roles)
      && lib.all (text: text != "") [
        service.manifest.name
        service.manifest.description
        service.manifest.readme
      ];
    "clan: every setting has a description" = lib.all (
      option: lib.isString (option.description or null) && option.description != ""
    ) interface;
    "clan: no setting has to be made" = lib.isAttrs (settingsOf "server" { });
    "clan: the settings are JSON" =
      let
        json = builtins.toJSON (settingsOf "server" settings);
      in
      builtins.toJSON (settingsOf "server" (builtins.fromJSON json)) == json;

    "clan: the guide's test-vm is accepted" = seed.ok && test-vm.config.ok && seed.config.warnings == [ ];
    "clan: vmName, autostart, vcpu, mem, interfaces, vsockCid, hypervisor" =
      lib.attrNames seed.config.microvm.vms == [ "test-vm" ]
      && test-vm.autostart
      && guest.microvm.vcpu == 2
      && guest.microvm.mem == 1024
      && guest.microvm.vsock.cid == 3
      && guest.microvm.hypervisor == "cloud-hypervisor"
      &&
        guest.microvm.interfaces == [
          {
            type = "tap";
            id = "vm-test";
            mac = "02:00:00:01:01:01";
            tap.vhost = false;
          }
        ];
    "clan: interfaces of each type" =
      (guestOf (
        server {
          vsockCid = 3;
          interfaces = [
            {
              type = "macvtap";
              id = "vm-m";
              mac = "02:00:00:01:01:02";
              macvtap = {
                link = "eth0";
                mode = "bridge";
              };
            }
            {
              type = "bridge";
              id = "vm-b";
              mac = "02:00:00:01:01:03";
              bridge = "br0";
            }
          ];
        }
      )).microvm.interfaces == [
        {
          type = "macvtap";
          id = "vm-m";
          mac = "02:00:00:01:01:02";
          macvtap = {
            link = "eth0";
            mode = "bridge";
          };
          tap.vhost = false;
        }
        {
          type = "bridge";
          id = "vm-b";
          mac = "02:00:00:01:01:03";
          bridge = "br0";
          tap.vhost = false;
        }
      ];
    "clan: the VM has the instance's name, and microvm.nix its defaults" =
      let
        machine = machineOf {
          instanceName = "web";
          roles.server.machines.britton-desktop.settings = {
            vsockCid = 3;
            autostart = false;
          };
        };
        inherit (machine.config.microvm.vms) web;
      in
      machine.ok
      && !web.autostart
      && web.config.config.microvm.hypervisor == "qemu"
      && web.config.config.microvm.vcpu == 1
      && web.config.config.microvm.mem == 512;
    "clan: several instances on one machine" =
      let
        machine = machineWith {
          name = "britton-desktop";
          instances =
            lib.mapAttrs
              (_: vsockCid: {
                roles.server.machines.britton-desktop.settings = {
                  inherit vsockCid;
                  runtimeSecrets.token = { };
                };
              })
              {
                one = 3;
                two = 4;
              };
        };
      in
      machine.ok
      && lib.attrNames machine.config.services.guestagent.vms == [
        "one"
        "two"
      ]
      && lib.attrNames machine.config.clan.core.vars.generators == [
        "microvm-one-token"
        "microvm-two-token"
      ];

    "clan: credentials: a var, under a name with the prefix" =
      lib.elem "HOST-API-KEY:${var "test-vm-secrets" "api-key"}" (providerOf seed).serviceConfig.LoadCredential
      && lib.attrNames seed.config.services.guestagent.vms.test-vm.credentials == [
        "HOST-API-KEY"
        "HOST-DB-PASSWORD"
        "HOST-JWT-SECRET"
        "root-password"
      ];
    "clan: credentials: the var's restartUnits have the provider, and the declaration stays" =
      generators.test-vm-secrets.files.api-key.restartUnits == [ "guestagent-provide@test-vm.service" ]
      && generators.test-vm-secrets.files.api-key.mode == "0400"
      && lib.hasInfix "openssl rand" generators.test-vm-secrets.script;
    "clan: credentials: a file of the host, and another prefix" =
      let
        machine = small {
          credentialPrefix = "web.";
          credentials.token = {
            source = "/etc/secrets/token";
            required = false;
          };
          credentials.key = {
            source = "/etc/secrets/key";
            destination = "KEY";
          };
        };
        c = machine.config.services.guestagent.vms.test-vm.credentials;
      in
      machine.ok
      && c."web.token".source == "/etc/secrets/token"
      && !c."web.token".required
      && c."web.KEY".source == "/etc/secrets/key"
      && lib.elem "web.KEY:/etc/secrets/key" (providerOf machine).serviceConfig.LoadCredential;
    "clan: credentials: a generator's file under another name" =
      let
        machine = small {
          credentials.key = {
            generator = "test-vm-secrets";
            file = "jwt-secret";
          };
        };
      in
      machine.ok
      && lib.elem "HOST-key:${var "test-vm-secrets" "jwt-secret"}" (providerOf machine).serviceConfig.LoadCredential;

    "clan: credentials: a generator that only asks" =
      (machineOf {
        roles.server.machines.britton-desktop.settings = {
          vsockCid = 3;
          credentials.token.generator = "asked";
        };
        modules = [ { clan.core.vars.generators.asked.prompts.token.persist = true; } ];
      }).ok;

    "clan: runtimeSecrets: the generator is made" =
      secret.ok
      && secretGenerator.script == "openssl rand -base64 32 | tr -d '\\n' > \"$out\"/'api-key'\n"
      && map (p: p.pname) secretGenerator.runtimeInputs == [ "openssl" ]
      && secretGenerator.files.api-key.secret
      && secretGenerator.files.api-key.restartUnits == [ "guestagent-provide@test-vm.service" ];
    "clan: runtimeSecrets: delivered over vsock under its name, and not at boot" =
      (providerOf secret).serviceConfig.LoadCredential == [
        "API_KEY:${var "microvm-test-vm-api-key" "api-key"}"
      ]
      && !(secret.config.systemd.services."microvm@test-vm".serviceConfig ? LoadCredential)
      && secret.config.warnings == [ ];
    "clan: runtimeSecrets: another script" =
      let
        machine = machineOf {
          roles.server.machines.britton-desktop.settings = {
            vsockCid = 3;
            runtimeSecrets.api-key = { };
          };
          modules = [
            {
              clan.core.vars.generators.microvm-test-vm-api-key.script = "pwgen -s 40 1 > \"$out\"/api-key";
            }
          ];
        };
      in
      machine.ok
      &&
        machine.config.clan.core.vars.generators.microvm-test-vm-api-key.script
        == "pwgen -s 40 1 > \"$out\"/api-key"
      && lib.hasPrefix "api-key:" (lib.head (providerOf machine).serviceConfig.LoadCredential);
    "clan: bootCredentials: as OEM strings, where that is asked for" =
      let
        machine = small {
          bootCredentials = true;
          runtimeSecrets.api-key.oemCredentialName = "API_KEY";
          guestModules = [ { microvm.qemu.machine = "q35"; } ];
        };
      in
      machine.ok
      && lib.hasInfix "boot-args" (guestOf machine).microvm.extraArgsScript
      && (hardeningOf machine).LoadCredential == [
        "guestagent.API_KEY:${var "microvm-test-vm-api-key" "api-key"}"
      ];
    "clan: exposeOnCommandLine: the guide's microvm-run, with a warning" =
      let
        machine = small {
          hypervisor = "cloud-hypervisor";
          bootCredentials = true;
          exposeOnCommandLine = true;
          runtimeSecrets.api-key.oemCredentialName = "API_KEY";
        };
      in
      machine.ok
      && lib.length machine.config.warnings == 1
      && lib.hasInfix "command line" (lib.head machine.config.warnings)
      && (hardeningOf machine).LoadCredential != [ ];

    "clan: staticOemStrings: cloud-hypervisor" =
      guest.microvm.cloud-hypervisor.platformOEMStrings == settings.staticOemStrings
      && guest.boot.kernelParams == [ ];
    "clan: staticOemStrings: QEMU with SMBIOS" = lib.all (
      machine:
      let
        config = strings "qemu" { microvm.qemu = { inherit machine; }; };
      in
      config.microvm.qemu.extraArgs == [
        "-smbios"
        "type=11,value=io.systemd.credential:ENVIRONMENT=a,,b"
        "-smbios"
        "type=11,value=io.systemd.credential.binary:CLUSTER=YnJpdHRvbg=="
      ]
      && config.boot.kernelParams == [ ]
    ) [ "pc" "q35" ];
    "clan: staticOemStrings: no SMBIOS on ARM" =
      (import ../../nixos/clan/oem.nix { inherit lib; }).smbiosOf {
        stdenv.hostPlatform.isx86_64 = false;
      } { hypervisor = "cloud-hypervisor"; } == null;
    "clan: staticOemStrings: without SMBIOS" = lib.all (
      hypervisor: onCommandLine (strings hypervisor { })
    ) [
      "alioth"
      "crosvm"
      "firecracker"
      "kvmtool"
      "qemu"
    ];

    "clan: serviceHardening: as in the guide, and more" = hardeningOf seed == hardening;
    "clan: serviceHardening: by default, and other values" =
      hardeningOf (small { }) == hardening
      &&
        hardeningOf (small {
          serviceHardening = {
            protectProc = "noaccess";
            procSubset = "all";
            restrictAddressFamilies = [ "AF_UNIX" ];
          };
        }) == hardening
        // {
          ProtectProc = "noaccess";
          ProcSubset = "all";
          RestrictAddressFamilies = [ "AF_UNIX" ];
        };
    "clan: serviceHardening: crosvm sees all of /proc, unless the settings say otherwise" =
      hardeningOf (small { hypervisor = "crosvm"; }) == hardening // { ProcSubset = "all"; }
      &&
        hardeningOf (small {
          guestModules = [ { microvm.hypervisor = "crosvm"; } ];
        }) == hardening // { ProcSubset = "all"; }
      && hardeningOf (small {
        hypervisor = "crosvm";
        serviceHardening.procSubset = "pid";
      }) == hardening;
    "clan: serviceHardening: off" =
      !((small { serviceHardening.enable = false; }).config.systemd.services ? "microvm@test-vm");
    "clan: serviceHardening: the machine's own words win" =
      (hardeningOf (machineOf {
        roles.server.machines.britton-desktop.settings.vsockCid = 3;
        modules = [ { systemd.services."microvm@test-vm".serviceConfig.ProtectHome = "read-only"; } ];
      })).ProtectHome == "read-only";
    "clan: serviceHardening: a bridge's helper has its capability" = leavesHelper (small {
      interfaces = bridge;
    });
    "clan: serviceHardening: a bridge that the guest's configuration has" =
      leavesHelper (machineOf {
        roles.server.machines.britton-desktop.settings.vsockCid = 3;
        modules = [ { microvm.vms.test-vm.extraModules = [ { microvm.interfaces = bridge; } ]; } ];
      })
      && leavesHelper (inMachine { modules = [ { microvm.interfaces = bridge; } ]; }).host;

    "clan: rootPassword: generated, and only its hash is deployed" =
      let
        g = generators.microvm-test-vm-root-password;
      in
      !g.files.password.deploy
      && g.files.hash.deploy
      # As an argument of printf, a failure of mkpasswd would go unnoticed.
      &&
        g.script == ''
          openssl rand -base64 18 | tr -d '\n' > "$out"/password
          hash=$(mkpasswd -s -m yescrypt < "$out"/password)
          printf 'root:%s\n' "$hash" > "$out"/hash
        ''
      && map (p: p.pname) g.runtimeInputs == [
        "mkpasswd"
        "openssl"
      ]
      && lib.elem "root-password:${var "microvm-test-vm-root-password" "hash"}" (providerOf seed).serviceConfig.LoadCredential;
    "clan: rootPassword: set in the guest by the credential" =
      let
        unit = guest.systemd.services.root-password;
      in
      unit.wantedBy == [ "multi-user.target" ]
      &&
        unit.serviceConfig == {
          # With nothing behind the colon chpasswd would let root in without a password.
          ExecStart = "/bin/sh -c 'IFS=: read -r name hash <\"$CREDENTIALS_DIRECTORY\"/root-password; test -n \"$hash\" && exec ${seed.pkgs.shadow}/bin/chpasswd -e <\"$CREDENTIALS_DIRECTORY\"/root-password'";
          LoadCredential = [ "root-password:/run/credstore/root-password" ];
          RemainAfterExit = true;
          Type = "oneshot";
        }
      &&
        (builtins.fromJSON guest.environment.etc."guestagent/config.json".source.text)
        .credentials.root-password.onChange == "restart";
    "clan: rootPassword and enableSsh: not by default" =
      let
        config = guestOf (small { });
      in
      !(config.systemd.services ? root-password)
      && !config.services.openssh.enable
      && !config.microvm.vsock.ssh.enable;
    "clan: enableSsh: on the network and over vsock" =
      guest.services.openssh.enable && guest.microvm.vsock.ssh.enable;

    "clan: guestModules: functions from extraModules, and plain values in the settings" =
      lib.elem "hello" (map (p: p.pname) guest.environment.systemPackages);
    "clan: guestModules: values with a priority" =
      (guestOf (small {
        guestModules = [
          { networking.hostName = "other"; }
          {
            microvm.vcpu = lib.mkForce 4;
          }
        ];
        vcpu = 2;
      })).microvm.vcpu == 4;

    "clan: a VM that is a machine of the clan" =
      machine.host.ok
      && machine.web.ok
      # What the other host's settings say is for the other guest.
      && machine.web.config.microvm.vcpu == 2
      && machine.web.config.microvm.vsock.cid == 300
      && machine.web.config.services.guestagent.enable
      && machine.web.config.systemd.services ? root-password
      && machine.host.config.microvm.vms.test-vm.config == null
      &&
        machine.host.config.microvm.vms.test-vm.evaluatedConfig.config.networking.hostName == "web";
    "clan: a VM that is a machine of the clan, with vsock as a socket" =
      let
        machine = inMachine { hypervisor = "cloud-hypervisor"; };
      in
      machine.host.ok && machine.web.ok;

    "clan: a guest that is refused has a configuration all the same" =
      # microvm.nix reads it for the units, and fails before an assertion is looked at.
      (guestOf (small {
        guest = "web";
        vcpu = 2;
      })).microvm.vcpu == 2
      && (guestOf (inMachine { isVM = false; }).host).microvm.vcpu == 2;

    "clan: test-vm's units are those of the modules alone" =
      let
        units = machine: lib.filterAttrs (name: _: lib.hasPrefix "guestagent" name) machine.config.systemd.unitText;
        byHand = nixos [
          ./microvm.nix
          ../../nixos/host.nix
          {
            microvm.vms.test-vm.config = {
              microvm.hypervisor = "cloud-hypervisor";
              microvm.vsock.cid = 3;
            };
            services.guestagent.vms.test-vm.credentials = {
              "HOST-API-KEY".source = var "test-vm-secrets" "api-key";
              "HOST-DB-PASSWORD".source = var "test-vm-secrets" "db-password";
              "HOST-JWT-SECRET".source = var "test-vm-secrets" "jwt-secret";
              root-password.source = var "microvm-test-vm-root-password" "hash";
            };
          }
        ];
      in
      units seed == units byHand
      && units seed ? "guestagent-provide@test-vm.service"
      &&
        seed.config.environment.etc."guestagent/vms.d/test-vm.json".text
        == byHand.config.environment.etc."guestagent/vms.d/test-vm.json".text;

    "clan: a VM that is declared directly stands beside the instance" =
      let
        machine = machineOf {
          inherit (testVM.instance) roles;
          modules = [
            testVM.machine
            { microvm.vms.other.config.microvm.vsock.cid = 4; }
          ];
        };
      in
      machine.ok
      && lib.attrNames machine.config.microvm.vms == [
        "other"
        "test-vm"
      ]
      && lib.attrNames machine.config.services.guestagent.vms == [ "test-vm" ]
      && !(machine.config.microvm.vms.other.config.config.services ? guestagent);
    "clan: the direct form of the same VM, at the same time" =
      let
        machine = machineOf {
          inherit (testVM.instance) roles;
          modules = [
            testVM.machine
            direct
          ];
        };
      in
      machine.ok && (hardeningOf machine).LoadCredential == [ "host-api-key:${var "test-vm-secrets" "api-key"}" ];
    "clan: rollback: without the instance the direct form is all there is" =
      let
        machine = nixos [
          vars
          ./microvm.nix
          { networking.hostName = "britton-desktop"; }
          testVM.machine
          direct
          ../../nixos/host.nix
        ];
      in
      machine.ok
      && lib.attrNames machine.config.microvm.vms == [ "test-vm" ]
      && lib.attrNames machine.config.systemd.services == [ "microvm@test-vm" ]
      && !(lib.any (lib.hasPrefix "guestagent") (lib.attrNames machine.config.environment.etc))
      && machine.config.clan.core.vars.generators.test-vm-secrets.files.api-key.restartUnits == [ ]
      && !((guestOf machine).services ? guestagent);
  };
  refused =
    refusals
    // lib.mapAttrs' (
      name: message:
      lib.nameValuePair "clan: docs: ${name}" {
        inherit (refusals."clan: ${name}") value;
        inherit message;
      }
    ) explained;
}
