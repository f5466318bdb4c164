# The host's module, with microvm.nix's, or a stand-in for it, and without.
{
  lib,
  nixos,
  microvm ? ./microvm.nix,
}:
let
  without =
    modules:
    nixos (
      [
        ../../nixos/host.nix
      ]
      ++ modules
    );
  evaluate = modules: without ([ microvm ] ++ modules);
  # A VM of microvm.nix: the guest's configuration, and what services.guestagent.vms.web has.
  web = guest: vm: {
    microvm.vms.web.config = guest;
    services.guestagent.vms.web = vm;
  };
  qemu.microvm.vsock.cid = 3;
  cloudHypervisor.microvm = {
    hypervisor = "cloud-hypervisor";
    vsock.cid = 3;
  };
  q35.microvm = {
    vsock.cid = 3;
    qemu.machine = "q35";
  };
  db.credentials.db.source = "/var/lib/secrets/db";
  sopsNix = ./sops-nix.nix;
  agenix = {
    options.age.secrets = lib.mkOption {
      type = lib.types.attrsOf (
        lib.types.submodule (
          { name, ... }:
          {
            options = {
              path = lib.mkOption {
                type = lib.types.str;
                default = "/run/agenix/${name}";
              };
              file = lib.mkOption { type = lib.types.path; };
            };
          }
        )
      );
      default = { };
    };
  };
  # A guest that was evaluated elsewhere.
  evaluated =
    modules:
    (systemOf [ { microvm.vms.web.config.imports = modules; } ]).microvm.vms.web.config;
  given = modules: { microvm.vms.web.evaluatedConfig = evaluated modules; };
  agent = [
    ../../nixos/module.nix
    { services.guestagent.enable = true; }
  ];

  systemOf = modules: (evaluate modules).config;
  serviceOf = name: modules: (systemOf modules).systemd.services.${name};
  provideOf = serviceOf "guestagent-provide@web";
  optionsOf = modules: (provideOf modules).environment.PROVIDE_OPTIONS;
  guestOf = modules: (systemOf modules).microvm.vms.web.config.config;
  registered =
    modules: builtins.fromJSON (systemOf modules).environment.etc."guestagent/vms.d/web.json".text;
  vmOf = modules: (systemOf modules).services.guestagent.vms.web;

  bare = (evaluate [ ]).config;
  others = config: removeAttrs config [ "services" ];

  # An assertion that fails, with its message.
  asserts = message: modules: {
    value = (evaluate modules).ok;
    inherit message;
  };
  assertsWithout = message: modules: {
    value = (without modules).ok;
    inherit message;
  };
  option = "services.guestagent.vms.web";
  hundred = lib.concatStringsSep "" (lib.genList (_: "x") 100);
in
{
  holds = {
    "host: without a VM, it sets nothing" = others bare == others (nixos [ microvm ]).config;
    "host: without a VM and microvm.nix, it sets nothing" =
      removeAttrs (without [ ]).config [
        "services"
        "microvm"
      ] == others (nixos [ ]).config;
    "host: a VM of microvm.nix that is not named is left alone" =
      let
        settings.microvm.vms.web.config = qemu;
      in
      !(guestOf [ settings ] ? services.guestagent)
      && others (systemOf [ settings ] // { inherit (bare) microvm; }) == others bare;
    "host: it makes no VM" =
      (systemOf [ { services.guestagent.vms.web.cid = 3; } ]).microvm.vms == { };
    "host: no assertion fails" =
      (evaluate [ (web qemu db) ]).ok && (evaluate [ (web cloudHypervisor db) ]).ok;
    "host: systemd gets the package's units" =
      map (p: p.pname) (systemOf [ (web qemu db) ]).systemd.packages == [ "guestctl" ];
    "host: the group that the exporter is in" = (systemOf [ (web qemu db) ]).users.groups ? guestagent;
    "host: every option is described" =
      let
        undescribed =
          tree:
          lib.concatMap (
            o:
            if o._type or "" == "option" then
              lib.optional (o.description or "" == "") o
              ++ undescribed (if o.type ? getSubOptions then o.type.getSubOptions [ ] else { })
            else
              undescribed o
          ) (lib.filter lib.isAttrs (lib.attrValues tree));
      in
      undescribed (evaluate [ ]).options.services.guestagent == [ ];

    "host: QEMU is reached by its CID, and calls a port of its own" =
      registered [ (web qemu db) ] == {
        target = "vsock:3";
        provider.port = 771;
      };
    "host: cloud-hypervisor is reached by its socket, and calls the common port" =
      registered [ (web cloudHypervisor db) ] == {
        target = "vsock-mux:/var/lib/microvms/web/notify.vsock";
        provider.port = 1021;
      };
    "host: the socket is where microvm.nix is told to keep the VMs" =
      (vmOf [
        (web cloudHypervisor db)
        { microvm.stateDir = "/srv/vms"; }
      ]).socket == "/srv/vms/web/notify.vsock";
    "host: the agent's port is the guest's" =
      (registered [ (web (qemu // { services.guestagent.vsock.port = 1000; }) db) ]).target
      == "vsock:3:1000";
    "host: a port does not change with another VM" =
      (registered [
        (web qemu db)
        {
          microvm.vms.a.config.microvm.vsock.cid = 4;
          services.guestagent.vms.a = { };
        }
      ]) == registered [ (web qemu db) ];
    "host: a port that is given out by hand" =
      (registered [ (web qemu (db // { providerPort = 800; })) ]).provider.port == 800;
    "host: the ports of all CIDs are in range" =
      map (cid: (vmOf [ { services.guestagent.vms.web.cid = cid; } ]).providerPort) [
        3
        253
        254
        1021
        4294967294
      ] == [
        771
        1021
        768
        773
        (768 + lib.mod 4294967294 254)
      ];

    "host: the guest has the agent, and knows its provider" =
      let
        inherit (guestOf [ (web qemu db) ]) services;
      in
      services.guestagent.enable
      && services.guestagent.provider.address == "vsock:2:771"
      && services.guestagent.peer.privilegedPort == null;
    "host: a guest behind a socket takes calls from any port" =
      let
        inherit (guestOf [ (web cloudHypervisor db) ]) services;
      in
      services.guestagent.provider.address == "vsock:2:1021"
      && services.guestagent.peer.privilegedPort == "ignored";
    "host: QEMU behind a socket, too" =
      (guestOf [ (web qemu (db // { socket = "/run/web/vsock.sock"; })) ])
      .services.guestagent.peer.privilegedPort == "ignored";
    "host: a guest that imports the module itself" =
      (evaluate [ (web { imports = agent ++ [ qemu ]; } db) ]).ok;
    "host: a guest that its VMM's options are set for here" =
      (evaluate [
        (web qemu db)
        {
          microvm.vms.web.config.microvm.hypervisor = "crosvm";
        }
      ]).ok;
    "host: a guest's required credential with a source" =
      (evaluate [ (web (qemu // { services.guestagent.credentials.db = { }; }) db) ]).ok;
    "host: a guest's credential by its name, not its entry" =
      (evaluate [ (web (qemu // { services.guestagent.credentials.x.name = "db"; }) db) ]).ok;
    "host: a guest's credential that is not required" =
      (evaluate [ (web (qemu // { services.guestagent.credentials.x.required = false; }) db) ]).ok;

    "host: a guest that comes evaluated" =
      (evaluate [
        (given (
          agent
          ++ [
            qemu
            { services.guestagent.provider.address = "vsock:2:771"; }
          ]
        ))
        { services.guestagent.vms.web = db; }
      ]).ok;
    "host: a guest of a flake" =
      let
        flake.outPath = "/flake";
        flake.nixosConfigurations.web =
          evaluated (agent ++ [ cloudHypervisor ]);
      in
      (evaluate [
        {
          microvm.vms.web = { inherit flake; };
          services.guestagent.vms.web = db;
        }
      ]).ok;
    "host: a guest that asks nobody" =
      (evaluate [ (web (qemu // { services.guestagent.provider.address = lib.mkForce null; }) db) ]).ok;

    "host: a VM without microvm.nix" =
      let
        system = without [
          {
            services.guestagent.vms.web = db // {
              cid = 7;
              unit = "web-vm.service";
            };
          }
        ];
        provide = system.config.systemd.services."guestagent-provide@web";
      in
      system.ok
      && provide.wantedBy == [ "web-vm.service" ]
      && provide.partOf == [ "web-vm.service" ]
      && provide.before == [ "web-vm.service" ]
      && provide.after == [ "guestagent-sources@web.service" ];
    "host: a VM that no unit runs" =
      let
        provide =
          (without [ { services.guestagent.vms.web.socket = "/srv/web/vsock.sock"; } ])
          .config.systemd.services."guestagent-provide@web";
      in
      provide.wantedBy == [ "multi-user.target" ]
      && provide.partOf == [ ]
      && provide.serviceConfig.ReadWritePaths == [ "/srv/web" ];
    "host: microvm.nix that is off is as none" =
      (evaluate [
        {
          microvm.host.enable = false;
          services.guestagent.vms.web.cid = 3;
        }
      ]).config.systemd.services."guestagent-provide@web".wantedBy == [ "multi-user.target" ];

    "host: the provider runs with the VM, is stopped after it, and finds its folder" =
      let
        provide = provideOf [ (web cloudHypervisor db) ];
      in
      provide.overrideStrategy == "asDropin"
      && provide.wantedBy == [
        "microvm@web.service"
        "microvms.target"
      ]
      && provide.partOf == [ "microvm@web.service" ]
      && provide.before == [ "microvm@web.service" ]
      &&
        provide.after == [
          "install-microvm-web.service"
          "guestagent-sources@web.service"
        ]
      && provide.serviceConfig.ReadWritePaths == [ "/var/lib/microvms/web" ];
    "host: the provider of a VM that the host does not start" =
      (provideOf [
        (web qemu db)
        { microvm.vms.web.autostart = false; }
      ]).wantedBy == [ "microvm@web.service" ];
    "host: with AF_VSOCK the provider writes nowhere" =
      !((provideOf [ (web qemu db) ]).serviceConfig ? ReadWritePaths);
    "host: a switch restarts the provider in one step, and whenever its VM is reached otherwise" =
      let
        provide = provideOf [ (web qemu db) ];
      in
      !provide.stopIfChanged
      &&
        provide.restartTriggers != (provideOf [ (web qemu (db // { providerPort = 800; })) ]).restartTriggers;
    "host: a switch leaves what waits for a guest alone" =
      let
        inherit ((systemOf [ (web qemu db) ]).systemd) services;
      in
      !services."guestagent-ready@web".restartIfChanged && !services."guestagent-ready@".restartIfChanged;
    "host: what is said of all instances is said of each" =
      let
        inherit ((systemOf [ (web qemu db) ]).systemd) services;
        all = services."guestagent-provide@";
        one = services."guestagent-provide@web";
      in
      all.unitConfig.ConditionPathExists == one.unitConfig.ConditionPathExists
      && all.stopIfChanged == one.stopIfChanged;
    "host: waiting for a guest ends with its VM" =
      let
        ready = serviceOf "guestagent-ready@web" [ (web qemu db) ];
      in
      ready.partOf == [ "microvm@web.service" ] && ready.after == [ "microvm@web.service" ];

    "host: credentials are loaded under their names in the guest" =
      (provideOf [
        (web qemu {
          credentials.db = {
            source = "/srv/secrets/a:b%i";
            destination = "50%db";
          };
        })
      ]).serviceConfig.LoadCredential == [ "50%%db:/srv/secrets/a:b%%i" ];
    "host: a prefix is put before, and taken off" =
      (provideOf [ (web qemu (db // { credentialPrefix = "web."; })) ]).serviceConfig.LoadCredential
      == [ "web.db:/var/lib/secrets/db" ]
      &&
        optionsOf [ (web qemu (db // { credentialPrefix = "web."; })) ]
        == "--report-group guestagent --prefix web.";
    "host: what the provider is told" =
      optionsOf [
        (web qemu (
          db
          // {
            refresh = "auto";
            gate = "90s";
          }
        ))
      ] == "--report-group guestagent --refresh auto --gate 90s";
    "host: a VM without credentials has an empty folder" =
      let
        provide = provideOf [ (web qemu { credentialPrefix = "web."; }) ];
      in
      provide.environment.PROVIDE_OPTIONS == "--report-group guestagent --dir /run/guestagent/empty"
      && provide.serviceConfig.RuntimeDirectory == [ "guestagent/empty" ]
      && !((systemOf [ (web qemu { }) ]).systemd.services ? "guestagent-sources@web");
    "host: what is not required may be missing" =
      let
        system = systemOf [ (web qemu { credentials.db = db.credentials.db // { required = false; }; }) ];
      in
      system.systemd.services."guestagent-provide@web".serviceConfig.LoadCredential
      == [ "db:guestagent.web.db" ]
      && system.environment.etc."credstore/guestagent.web.db".source == "/var/lib/secrets/db"
      && system.systemd.paths."guestagent-sources@web".pathConfig.PathChanged == [ "/var/lib/secrets/db" ];
    "host: a socket in somebody's home" =
      (provideOf [ (web qemu { socket = "/home/web/vsock.sock"; }) ]).serviceConfig.ProtectHome == false;

    "host: a file that changes reloads the provider" =
      let
        inherit (systemOf [ (web qemu db) ]) systemd;
        path = systemd.paths."guestagent-sources@web";
        refresh = systemd.services."guestagent-sources@web";
      in
      path.wantedBy == [ "paths.target" ]
      && path.pathConfig.PathChanged == [ "/var/lib/secrets/db" ]
      && lib.hasSuffix "/bin/systemctl --no-block try-reload-or-restart guestagent-provide@web.service" refresh.serviceConfig.ExecStart
      && systemd.services."guestagent-provide@web".serviceConfig.RefreshOnReload == "credentials";
    "host: before systemd 260 it restarts it" =
      let
        inherit
          (systemOf [
            (web qemu db)
            ({ pkgs, ... }: { systemd.package = pkgs.systemd // { version = "257.9"; }; })
          ])
          systemd
          ;
      in
      lib.hasSuffix " --no-block try-restart guestagent-provide@web.service" systemd.services."guestagent-sources@web".serviceConfig.ExecStart
      && !(systemd.services."guestagent-provide@web".serviceConfig ? RefreshOnReload);
    "host: with AF_VSOCK, not everybody may take a CID" =
      let
        rules = modules: (systemOf modules).services.udev.extraRules;
      in
      rules [ (web qemu db) ] == "KERNEL==\"vhost-vsock\", GROUP=\"kvm\", MODE=\"0660\"\n"
      && (systemOf [ (web qemu db) ]).systemd.tmpfiles.rules == [ "z /dev/vhost-vsock 0660 - kvm" ]
      && rules [ (web cloudHypervisor db) ] == "";
    "host: a source on the network holds up nothing" =
      let
        path = (systemOf [ (web qemu db) ]).systemd.paths."guestagent-sources@web";
      in
      !path.unitConfig.DefaultDependencies && path.after == [ "sysinit.target" ];
    "host: a change while another is passed on is not lost" =
      lib.elem "guestagent-sources@web.service" (provideOf [ (web qemu db) ]).after;
    "host: a file may change as often as it likes" =
      (serviceOf "guestagent-sources@web" [ (web qemu db) ]).startLimitIntervalSec == 0
      && lib.hasInfix "\nStartLimitIntervalSec=0\n" (
        builtins.readFile (../../systemd/host + "/guestagent-provide@.service")
      );
    "host: sops-nix restarts the provider" =
      let
        system = evaluate [
          sopsNix
          (web qemu {
            credentials.db.sops = "web/db";
            credentials.again.sops = "web/db";
          })
          { sops.secrets."web/db".restartUnits = [ "other.service" ]; }
        ];
        inherit (system) config;
        provide = config.systemd.services."guestagent-provide@web";
      in
      system.ok
      &&
        lib.sort (a: b: a < b) config.sops.secrets."web/db".restartUnits == [
          "guestagent-provide@web.service"
          "other.service"
        ]
      &&
        provide.serviceConfig.LoadCredential == [
          "again:/run/secrets/web/db"
          "db:/run/secrets/web/db"
        ]
      && lib.elem "sops-install-secrets.service" provide.after
      && config.systemd.paths == { };
    "host: a source that is a secret's path is provided anew by a switch that changes the secret" =
      let
        provide = provideOf [
          sopsNix
          (
            { config, ... }:
            web qemu { credentials.db.source = config.sops.secrets."web/db".path; }
          )
          {
            sops.secrets."web/db".sopsFileHash = "db-hash";
            sops.secrets.other.sopsFileHash = "other-hash";
          }
        ];
      in
      lib.length provide.restartTriggers == 2
      && lib.elem "db-hash" provide.restartTriggers
      && lib.elem "sops-install-secrets.service" provide.after;
    "host: agenix' file restarts the provider" =
      lib.elem /etc/secrets/db.age
        (provideOf [
          agenix
          (web qemu { credentials.db.source = "/run/agenix/db"; })
          { age.secrets.db.file = /etc/secrets/db.age; }
          { age.secrets.other.file = /etc/secrets/other.age; }
        ]).restartTriggers;

    "host: QEMU boots with strings" =
      (guestOf [ (web q35 (db // { boot.strings = [ "org.example:a=b" ]; })) ])
      .microvm.extraArgsScript == "/nix/store/00000000000000000000000000000000-guestctl/bin/guestctl boot-args --vmm qemu --out /run/guestagent/boot/web --string 'org.example:a=b'";
    "host: QEMU boots with credentials, as the VM's user" =
      let
        settings = web q35 {
          credentials.db.source = "/var/lib/secrets/db";
          credentials.later = {
            source = "/var/lib/secrets/later";
            required = false;
          };
          credentialPrefix = "web.";
          boot.credentials = true;
        };
        inherit (serviceOf "microvm@web" [ settings ]) serviceConfig;
      in
      (evaluate [ settings ]).ok
      &&
        lib.hasSuffix "--out /run/guestagent/boot/web --dir \"$CREDENTIALS_DIRECTORY\" --prefix guestagent." (guestOf [
          settings
        ]).microvm.extraArgsScript
      && serviceConfig.LoadCredential == [ "guestagent.db:/var/lib/secrets/db" ]
      && serviceConfig.RuntimeDirectory == [ "guestagent/boot/web" ]
      && serviceConfig.RuntimeDirectoryMode == "0700";
    "host: cloud-hypervisor boots with strings, whichever it is" =
      let
        chosen =
          { pkgs, ... }:
          {
            imports = [ cloudHypervisor ];
            microvm.cloud-hypervisor.package = pkgs.hello // {
              version = "51.1";
            };
          };
        inherit ((guestOf [ (web chosen (db // { boot.strings = [ "a b" ]; })) ]).microvm.cloud-hypervisor)
          package
          ;
      in
      package.name == "guestagent-cloud-hypervisor" && package.version == "51.1";
    "host: without strings, cloud-hypervisor is as it was" =
      (guestOf [ (web cloudHypervisor db) ]).microvm.cloud-hypervisor.package.pname == "cloud-hypervisor"
      &&
        !((systemOf [ (web cloudHypervisor db) ]).systemd.services."microvm@web" or { serviceConfig = { }; })
        .serviceConfig ? LoadCredential;
    "host: values on a command line are warned of" =
      let
        settings = web cloudHypervisor (
          db
          // {
            boot.credentials = true;
            exposeOnCommandLine = true;
          }
        );
      in
      (evaluate [ settings ]).ok
      && lib.length (systemOf [ settings ]).warnings == 1
      && lib.hasInfix "web.exposeOnCommandLine" (lib.head (systemOf [ settings ]).warnings)
      && (systemOf [ (web cloudHypervisor db) ]).warnings == [ ];
    "host: a name that a switch does not see through is warned of" =
      lib.hasInfix "systemctl restart guestagent-provide@web.example"
        (lib.head (without [ { services.guestagent.vms."web.example".cid = 3; } ]).config.warnings);

    "host: the exporter, where it is by default" =
      let
        inherit (systemOf [ { services.guestagent.exporter.enable = true; } ]) systemd users;
      in
      systemd.sockets.guestagent-exporter.wantedBy == [ "sockets.target" ]
      && systemd.sockets.guestagent-exporter.listenStreams == [ ]
      && systemd.services.guestagent-exporter.wantedBy == [ "multi-user.target" ]
      && users.groups ? guestagent;
    "host: the exporter elsewhere, and a switch has it listen there" =
      let
        of =
          exporter:
          (systemOf [
            {
              services.guestagent.exporter = exporter // {
                enable = true;
              };
            }
          ]).systemd;
        other = of {
          listenAddress = "::1";
          port = 9999;
        };
      in
      other.sockets.guestagent-exporter.listenStreams == [
        ""
        "[::1]:9999"
      ]
      &&
        other.services.guestagent-exporter.restartTriggers
        != (of { }).services.guestagent-exporter.restartTriggers;
  };

  refused = {
    "host: an option that does not exist" = {
      value = vmOf [ (web qemu (db // { credential = { }; })) ];
      message = "${option}.credential' does not exist";
    };
    "host: a hypervisor that does not exist" = {
      value = vmOf [ (web qemu { hypervisor = "xen"; }) ];
      message = "${option}.hypervisor' is not of type `null or one of";
    };
    "host: a source that would be copied into the store" = {
      value = vmOf [ (web qemu { credentials.db.source = /etc/secrets/db; }) ];
      message = "${option}.credentials.db.source' is not of type `null or string'";
    };
    "host: a port that others could take" = {
      value = vmOf [ (web qemu { providerPort = 1022; }) ];
      message = "${option}.providerPort' is not of type `integer between 768 and 1021";
    };
    "host: a prefix that is no word" = {
      value = vmOf [ (web qemu { credentialPrefix = "a b"; }) ];
      message = "${option}.credentialPrefix' is not of type `string matching";
    };
    "host: a unit without its suffix" = {
      value = vmOf [ (web qemu { unit = "web-vm"; }) ];
      message = "${option}.unit' is not of type `null or";
    };
    "host: a gate that is no time" = {
      value = vmOf [ (web qemu { gate = "soon"; }) ];
      message = "${option}.gate' is not of type `null or";
    };

    "host: a VM's name with a space" =
      assertsWithout "services.guestagent.vms.a b: units and sockets are named for the VM"
        [ { services.guestagent.vms."a b".cid = 3; } ];
    "host: a VM's name that is too long" =
      assertsWithout "so that its name has 1 to 78 letters"
        [ { services.guestagent.vms.${hundred}.cid = 3; } ];
    "host: stratovirt" = asserts "${option}: microvm.nix gives no vsock to stratovirt" [
      (web {
        microvm = {
          hypervisor = "stratovirt";
          vsock.cid = 3;
        };
      } db)
    ];
    "host: a guest without a CID" =
      asserts "Set microvm.vsock.cid in microvm.vms.web.config, to a number from 3 on" [ (web { } db) ];
    "host: a guest that comes evaluated without a CID" =
      asserts "Set microvm.vsock.cid in the guest's own configuration, which comes evaluated"
        [
          (given agent)
          { services.guestagent.vms.web = db; }
        ];
    "host: a VM that nothing says how to reach" =
      assertsWithout "Set ${option}.cid, or ${option}.socket where the VMM shows vsock as a Unix socket"
        [ { services.guestagent.vms.web = db; } ];
    "host: cloud-hypervisor without its socket" =
      assertsWithout "Set ${option}.socket to the path where cloud-hypervisor shows vsock"
        [ { services.guestagent.vms.web.hypervisor = "cloud-hypervisor"; } ];
    "host: a CID and a socket" = assertsWithout "${option}: it has a cid and a socket" [
      {
        services.guestagent.vms.web = {
          cid = 3;
          socket = "/srv/web/vsock.sock";
        };
      }
    ];
    "host: a CID for cloud-hypervisor" =
      assertsWithout "${option}.cid: cloud-hypervisor shows vsock as a Unix socket" [
        {
          services.guestagent.vms.web = {
            cid = 3;
            hypervisor = "cloud-hypervisor";
          };
        }
      ];
    "host: a CID that is the host's" = asserts "${option}.cid: 2 cannot be a VM's" [
      (web { microvm.vsock.cid = 2; } db)
    ];
    "host: a CID that is nobody's" = assertsWithout "${option}.cid: 4294967295 cannot be a VM's" [
      { services.guestagent.vms.web.cid = 4294967295; }
    ];
    "host: a CID that two have" = assertsWithout "${option}.cid: 3 is also that of db" [
      {
        services.guestagent.vms = {
          db.cid = 3;
          web.cid = 3;
        };
      }
    ];
    "host: a CID that a VM has which is not named" = asserts "${option}.cid: 3 is also that of other" [
      (web qemu db)
      { microvm.vms.other.config = qemu; }
    ];
    "host: a port that two have" = assertsWithout "${option}.providerPort: 771 is also that of db" [
      {
        services.guestagent.vms = {
          db.cid = 257;
          web.cid = 3;
        };
      }
    ];
    "host: a socket that is no path" = assertsWithout "${option}.socket: it should be an absolute path" [
      { services.guestagent.vms.web.socket = "notify.vsock"; }
    ];
    "host: a socket that is too long" = asserts "Choose a shorter folder, with microvm.nix by microvm.stateDir" [
      (web cloudHypervisor db)
      { microvm.stateDir = "/srv/${hundred}"; }
    ];
    "host: a socket that two have" = assertsWithout "${option}.socket: it is also that of db" [
      {
        services.guestagent.vms = {
          db.socket = "/srv/vsock.sock";
          web.socket = "/srv/vsock.sock";
        };
      }
    ];
    "host: two credentials that become one" = asserts "${option}.credentials: two of them are db in the guest" [
      (web qemu {
        credentials.db.source = "/srv/a";
        credentials.other = {
          source = "/srv/b";
          destination = "db";
        };
      })
    ];
    "host: a name that systemd does not take" = asserts "${option}.credentials.a/b.destination" [
      (web qemu { credentials."a/b".source = "/srv/a"; })
    ];
    "host: a name that a switch does not understand" = asserts "neither . nor a quote in front" [
      (web qemu { credentials."\"db".source = "/srv/a"; })
    ];
    "host: a name with a space" = asserts "${option}.credentials.a b.destination" [
      (web qemu { credentials."a b".source = "/srv/a"; })
    ];
    "host: a name with a backslash" = asserts "${option}.credentials.a\\b.destination" [
      (web qemu { credentials."a\\b".source = "/srv/a"; })
    ];
    "host: a source with a space" = asserts "no service can load a file with a space" [
      (web qemu { credentials.db.source = "/srv/a b"; })
    ];
    "host: a source with a backslash" = asserts "no service can load a file with a space" [
      (web qemu { credentials.db.source = "/srv/a\\b"; })
    ];
    "host: a name that the provider passes over" = asserts "${option}.credentials..db.destination" [
      (web qemu { credentials.".db".source = "/srv/a"; })
    ];
    "host: a name that is too long with its prefix" = asserts "Take 1 to 155 printable ASCII characters" [
      (web qemu {
        credentialPrefix = hundred;
        credentials."${hundred}${hundred}".source = "/srv/a";
      })
    ];
    "host: a credential without a source" =
      asserts "${option}.credentials.db: it has neither source nor sops"
        [ (web qemu { credentials.db = { }; }) ];
    "host: a credential with two sources" = asserts "${option}.credentials.db: it has source and sops" [
      sopsNix
      (web qemu {
        credentials.db = {
          source = "/srv/db";
          sops = "db";
        };
      })
    ];
    "host: sops without sops-nix" = asserts "${option}.credentials.db.sops: this host has no sops-nix" [
      (web qemu { credentials.db.sops = "db"; })
    ];
    "host: a source that is not absolute" =
      asserts "${option}.credentials.db.source: it is not an absolute path"
        [ (web qemu { credentials.db.source = "secrets/db"; }) ];
    "host: a source in the store" =
      asserts "${option}.credentials.db.source: it is in the Nix store"
        [ (web qemu { credentials.db.source = "${builtins.storeDir}/x-db"; }) ];
    "host: a source that is a link into the store" =
      asserts "${option}.credentials.db.source: it is in the Nix store"
        [
          (web qemu { credentials.db.source = "/etc/x-db"; })
          (
            { pkgs, ... }:
            {
              environment.etc.x-db.source = pkgs.writeText "x-db" "";
            }
          )
        ];
    "host: a pattern for what may be missing" = asserts "${option}.credentials.db.source: it has a '*'" [
      (web qemu {
        credentials.db = {
          source = "/var/lib/secrets/*";
          required = false;
        };
      })
    ];
    "host: a gate over nothing" = asserts "${option}.gate: nothing is refreshed" [
      (web qemu {
        gate = "30s";
        refresh = "none";
      })
    ];
    "host: a gate that is too long" = asserts "${option}.gate: 61m is too long" [
      (web qemu { gate = "61m"; })
    ];
    "host: a guest whose agent is off" =
      asserts "Leave out services.guestagent.enable = false in microvm.vms.web.config"
        [ (web (qemu // { services.guestagent.enable = false; }) db) ];
    "host: a guest that comes evaluated, without an agent" =
      asserts "Import the guest's module and set services.guestagent.enable = true in the guest's own configuration"
        [
          (given [ qemu ])
          { services.guestagent.vms.web = db; }
        ];
    "host: a guest without vsock" =
      asserts "${option}: the guest has services.guestagent.vsock.enable = false"
        [ (web (qemu // { services.guestagent.vsock.enable = false; }) { }) ];
    "host: an agent's port that is another" =
      asserts "${option}.port: it is 1000, and the guest's agent listens at 1022"
        [ (web qemu (db // { port = 1000; })) ];
    "host: a guest that calls somebody else" =
      asserts "Set services.guestagent.provider.address = \"vsock:2:771\" in microvm.vms.web.config"
        [ (web (qemu // { services.guestagent.provider.address = "vsock:2:772"; }) db) ];
    "host: a guest that comes evaluated and calls the common port" =
      asserts "${option}: the guest calls vsock:2:1021, and its provider listens at vsock:2:771"
        [
          (given (agent ++ [ qemu ]))
          { services.guestagent.vms.web = db; }
        ];
    "host: a guest that would refuse the provider" =
      asserts "Set services.guestagent.peer.privilegedPort = \"ignored\" in microvm.vms.web.config"
        [ (web (cloudHypervisor // { services.guestagent.peer.privilegedPort = "required"; }) db) ];
    "host: a guest's required credential without a source" =
      asserts "the guest requires key, which nobody hands over. Add ${option}.credentials.\"key\""
        [ (web (qemu // { services.guestagent.credentials.key = { }; }) db) ];
    "host: strings for a machine without SMBIOS" =
      asserts "${option}.boot: from here this VM cannot be given OEM strings"
        [ (web qemu { boot.strings = [ "a" ]; }) ];
    "host: strings for a VM without microvm.nix" =
      assertsWithout "have the VM's unit run guestctl boot-args"
        [
          {
            services.guestagent.vms.web = {
              cid = 3;
              boot.strings = [ "a" ];
            };
          }
        ];
    "host: strings for QEMU with a script of its own" =
      asserts "${option}.boot: microvm.extraArgsScript in microvm.vms.web.config is another script"
        [
          (web {
            microvm = q35.microvm // {
              extraArgsScript = "echo -no-shutdown";
            };
          } { boot.strings = [ "a" ]; })
        ];
    "host: too many strings" = asserts "${option}.boot: these are more than 255 strings" [
      (web q35 { boot.strings = lib.genList toString 256; })
    ];
    "host: a string that is a credential" = asserts "${option}.boot.strings: one is a credential" [
      (web q35 { boot.strings = [ "io.systemd.credential:a=b" ]; })
    ];
    "host: a string that cloud-hypervisor cannot pass on" =
      asserts "${option}.boot.strings: a,b has one of the characters \",\", \"\\\"\", \"[\", \"]\", which cloud-hypervisor cannot pass on"
        [ (web cloudHypervisor { boot.strings = [ "a,b" ]; }) ];
    "host: a string that a shell would split" =
      asserts "${option}.boot.strings: a b has one of the characters \" \", "
        [ (web q35 { boot.strings = [ "a b" ]; }) ];
    "host: a name that an OEM string cannot have" = asserts "${option}.credentials.a=b.destination: it has a '='" [
      (web q35 {
        credentials."a=b".source = "/srv/a";
        boot.credentials = true;
      })
    ];
    "host: values on a command line" =
      asserts "${option}.boot.credentials: cloud-hypervisor takes OEM strings from its command line only"
        [ (web cloudHypervisor (db // { boot.credentials = true; })) ];
  };
}
