# The guest module.
{ lib, nixos }:
let
  evaluate =
    settings:
    nixos [
      ../../nixos/module.nix
      settings
    ];
  systemWith = settings: (evaluate settings).config;
  guestOf = options: evaluate { services.guestagent = options // { enable = true; }; };
  guest = options: (guestOf options).config;
  # What the guest is with more modules, such as other people's.
  guestAnd =
    modules: options:
    (nixos (
      [
        ../../nixos/module.nix
        { services.guestagent = options // { enable = true; }; }
      ]
      ++ modules
    )).config;

  on = guest { };
  off = systemWith { };
  bare = (nixos [ ]).config;
  inherit ((evaluate { })) pkgs;

  settingsOf = system: builtins.fromJSON system.environment.etc."guestagent/config.json".source.text;
  settingsWith = options: settingsOf (guest options);
  packagesOf = system: map (p: p.pname) system.systemd.packages;
  # With one credential.
  serving = credential: guest { credentials.db = credential; };
  # As microvm.nix declares it, so far as it matters here.
  microvm = hypervisor: {
    options.microvm.hypervisor = lib.mkOption { type = lib.types.str; };
    config.microvm = { inherit hypervisor; };
  };
  sops = useSystemdActivation: {
    options.sops = {
      age.keyFile = lib.mkOption { type = lib.types.str; };
      useSystemdActivation = lib.mkOption { type = lib.types.bool; };
    };
    config.sops = {
      age.keyFile = "/run/credstore/age-key";
      inherit useSystemdActivation;
    };
  };
  systemdOf = version: { systemd.package = pkgs.systemd // { inherit version; }; };
  web = {
    systemd.services.web.serviceConfig = {
      ExecStart = "/bin/web";
      ExecStartPre = [ "/bin/prepare" ];
      ExecReload = "/bin/reload";
      LoadCredential = [ "own:/etc/own" ];
    };
  };

  # Every option that is written into the configuration file.
  everyOption = {
    credentials.db = {
      name = "db-password";
      onChange = "auto";
      reloadUnits = [ "nginx" ];
      restartUnits = [ "pgbouncer.service" ];
    };
    health = {
      disk = {
        degraded = 80;
        failing = 101;
      };
      ignoreUnits = [ "nightly-*.service" ];
      memory = {
        degraded = 1;
        failing = 50;
      };
    };
    peer.privilegedPort = "ignored";
    provider = {
      address = "vsock:2:1020";
      required = true;
      timeout = 120;
    };
    smbios.enable = false;
  };
  # The keys that have no option.
  otherSettings = {
    consumers.compare = true;
    names.allow = [ "ssh.*" ];
    policy.load = {
      "*" = [ ];
      "db-*" = [ "web.service" ];
    };
    previous.ttl = 3600;
    refresh.never = [ ];
    socket.wait = 300;
  };
  everySetting = otherSettings // {
    credentials.db-password = {
      onChange = "auto";
      reloadUnits = [ "nginx.service" ];
      restartUnits = [ "pgbouncer.service" ];
    };
    inherit (everyOption) health peer provider;
    smbios.read = "never";
  };
  everything = guest (everyOption // { settings = otherSettings; });

  # The prefixes in the agent's source.
  agentsDeniedPrefixes =
    let
      source = builtins.readFile ../../internal/agent/names.go;
      list = builtins.elemAt (builtins.match ".*deniedPrefixes = \\[]string\\{([^}]*)}.*" source) 0;
    in
    lib.filter (s: lib.isString s && lib.hasSuffix "." s) (builtins.split "[^a-z.]+" list);
in
{
  holds = {
    "module: disabled, it sets nothing" =
      removeAttrs off [ "services" ] == removeAttrs bare [ "services" ];
    "module: no assertion fails" = (guestOf { }).ok;
    "module: two copies of it are one" =
      (guestAnd [ (import ../../nixos/module.nix) ] { }).services.guestagent.enable;
    "module: systemd gets the package's units" = packagesOf on == [ "guestagent" ];
    "module: it adds to the services and defines none of its own" =
      lib.attrNames on.systemd.services == [
        "guestagent"
        "guestagent-import"
        "guestagent-pull"
      ]
      && lib.all (s: s.serviceConfig == { } && s.overrideStrategy == "asDropinIfExists") (
        lib.attrValues on.systemd.services
      );
    "module: it adds to the sockets" =
      lib.attrNames on.systemd.sockets == [
        "guestagent"
        "guestagent-credentials"
        "guestagent-local"
        "guestagent-report"
      ]
      && lib.all (s: s.enable && s.socketConfig == { } && s.listenStreams == [ ]) (
        lib.attrValues on.systemd.sockets
      );
    "module: it adds to the target" =
      lib.attrNames on.systemd.targets == [ "guestagent-credentials" ]
      && lib.all (t: t.unitConfig == { }) (lib.attrValues on.systemd.targets);
    "module: it adds nothing to the mount, which a switch would then mount anew" =
      lib.filter (lib.hasSuffix ".mount") (lib.attrNames on.systemd.unitText) == [ ];
    "module: the program is in the path" =
      map (p: p.pname) on.environment.systemPackages == [ "guestagent" ];
    "module: another package can be given" =
      let
        other = guest { package = pkgs.hello; };
      in
      other.systemd.packages == [ pkgs.hello ]
      && other.environment.systemPackages == [ pkgs.hello ]
      && lib.all (check: lib.hasInfix "${pkgs.hello}/bin/guestagent" check.text) other.system.checks;
    "module: the initrd has what PID 1 imports with" =
      lib.elem "dmi_sysfs" on.boot.initrd.availableKernelModules
      && lib.elem "qemu_fw_cfg" on.boot.initrd.availableKernelModules;
    "module: a guest without SMBIOS loads its modules" =
      !(lib.elem "dmi_sysfs" on.boot.kernelModules)
      && !(lib.elem "dmi_sysfs" on.boot.initrd.kernelModules);
    "module: a switch restarts the agent in one step" = !on.systemd.services.guestagent.stopIfChanged;
    "module: a switch restarts the agent for its configuration" =
      on.systemd.services.guestagent.restartTriggers == [
        on.environment.etc."guestagent/config.json".source
      ];
    "module: a switch leaves a pull and who requires it alone" =
      !on.systemd.services.guestagent-pull.restartIfChanged;
    "module: sops-nix and agenix in the guest decrypt after the import" =
      on.systemd.services.guestagent-import.before == [
        "agenix-install-secrets.service"
        "sops-install-secrets.service"
        "sops-install-secrets-for-users.service"
      ];

    "settings: what nobody sets is not in the file" =
      settingsOf on == { provider.address = "vsock:2:1021"; };
    "settings: the file with every option and every setting" = settingsOf everything == everySetting;
    "settings: an empty list is a setting" =
      settingsWith { settings.refresh.never = [ ]; }
      == settingsOf on // { refresh.never = [ ]; };
    "settings: a list is added to an option's" =
      lib.sort builtins.lessThan
        (settingsWith {
          health.ignoreUnits = [ "a.service" ];
          settings.health.ignoreUnits = [ "b.service" ];
        }).health.ignoreUnits == [
        "a.service"
        "b.service"
      ];
    "settings: what an option has written can be replaced" =
      (settingsWith {
        smbios.enable = false;
        settings.smbios.read = lib.mkForce "always";
      }).smbios.read == "always";
    "settings: they are checked when the system is built" =
      lib.length on.system.checks == 1
      && lib.all (
        check:
        lib.hasInfix "${on.services.guestagent.package}/bin/guestagent --root root check-config" check.text
        && lib.hasInfix "${on.environment.etc."guestagent/config.json".source}" check.text
      ) on.system.checks;
    "settings: a machine that cannot run the program does not" =
      (import ./mini/nixos.nix {
        modules = [
          ../../nixos/module.nix
          { services.guestagent.enable = true; }
        ];
        pkgsExtra = self: {
          stdenv.hostPlatform.system = "aarch64-linux";
          stdenv.buildPlatform.canExecute = platform: platform.system != "aarch64-linux";
        };
      }).config.system.checks == [ ];
    "settings: the drop-in of consumers.compare with it alone" =
      packagesOf (guest { settings.consumers.compare = true; }) == [
        "guestagent"
        "guestagent-compare"
      ]
      && packagesOf (guest { settings.consumers.compare = false; }) == [ "guestagent" ];

    "smbios: on says nothing, off says never" =
      !(settingsWith { smbios.enable = true; } ? smbios)
      && (settingsWith { smbios.enable = false; }).smbios.read == "never";

    "vsock: without it the socket is masked, nothing wants it, and nobody is asked" =
      let
        system = guest { vsock.enable = false; };
        socket = system.systemd.sockets.guestagent;
      in
      !socket.enable
      && socket.wantedBy == [ ]
      && settingsOf system == { }
      && !(lib.elem "vmw_vsock_virtio_transport" (
        system.boot.kernelModules ++ system.boot.initrd.availableKernelModules
      ))
      && (guestOf { vsock.enable = false; }).ok;
    "vsock: with it the module is loaded, in the initrd too" =
      lib.elem "vmw_vsock_virtio_transport" on.boot.kernelModules
      && lib.elem "vmw_vsock_virtio_transport" on.boot.initrd.availableKernelModules;
    "vsock: another port takes the place of the package's" =
      (guest { vsock.port = 1000; }).systemd.sockets.guestagent.listenStreams == [
        ""
        "vsock::1000"
      ];
    "vsock: without it a provider in a container can be asked" =
      (guestOf {
        vsock.enable = false;
        provider = {
          address = "unix:/run/provider.sock";
          holdBoot = true;
          required = true;
        };
      }).ok;

    "peer: the VMM decides where microvm.nix names it" =
      map (hypervisor: (settingsOf (guestAnd [ (microvm hypervisor) ] { })).peer.privilegedPort or null) [
        "cloud-hypervisor"
        "firecracker"
        "qemu"
      ] == [
        "ignored"
        "ignored"
        null
      ];
    "peer: the user decides before the VMM" =
      (settingsOf (
        guestAnd [ (microvm "cloud-hypervisor") ] { peer.privilegedPort = "required"; }
      )).peer.privilegedPort == "required";

    "provider: the host's module may say where it is" =
      (settingsWith { provider.address = lib.mkDefault "vsock:2:900"; }).provider.address
      == "vsock:2:900";
    "provider: nobody is asked with null" = settingsWith { provider.address = null; } == { };
    "provider: the drop-in of holdBoot with it alone" =
      packagesOf (guest { provider.holdBoot = true; }) == [
        "guestagent"
        "guestagent-hold-boot"
      ]
      && packagesOf (guest { provider.holdBoot = false; }) == [ "guestagent" ];

    "credentials: by path, required" =
      let
        service = (serving { services = [ "web" ]; }).systemd.services.web;
      in
      service.serviceConfig == {
        LoadCredential = [ "db:/run/credstore/db" ];
      }
      && service.after == [ "guestagent-credentials.target" ]
      && service.wants == [ "guestagent-credentials.target" ];
    "credentials: by path, not required" =
      (serving {
        services = [ "web" ];
        required = false;
      }).systemd.services.web.serviceConfig.LoadCredential == [ "db" ];
    "credentials: by socket" =
      let
        service =
          (serving {
            services = [ "web" ];
            via = "socket";
          }).systemd.services.web;
      in
      service.serviceConfig == {
        LoadCredential = [ "db:/run/guestagent/credentials.sock" ];
        ExecStartPre = [ "${pkgs.coreutils}/bin/test -s \${CREDENTIALS_DIRECTORY}/db" ];
      }
      && service.after == [ "guestagent-credentials.socket" ]
      && service.wants == [ "guestagent-credentials.socket" ];
    "credentials: a service keeps what it has, and the test comes before its commands" =
      (guestAnd [ web ] {
        credentials.db = {
          services = [ "web" ];
          via = "socket";
        };
      }).systemd.services.web.serviceConfig == {
        ExecReload = "/bin/reload";
        ExecStart = "/bin/web";
        ExecStartPre = [
          "${pkgs.coreutils}/bin/test -s \${CREDENTIALS_DIRECTORY}/db"
          "/bin/prepare"
        ];
        LoadCredential = [
          "db:/run/guestagent/credentials.sock"
          "own:/etc/own"
        ];
      };
    "credentials: several of one service" =
      let
        service =
          (guest {
            credentials = {
              a.services = [ "web" ];
              b.services = [ "web.service" ];
              c = {
                services = [ "web" ];
                via = "socket";
              };
            };
          }).systemd.services.web;
      in
      service.serviceConfig.LoadCredential == [
        "a:/run/credstore/a"
        "b:/run/credstore/b"
        "c:/run/guestagent/credentials.sock"
      ]
      && lib.length service.serviceConfig.ExecStartPre == 1
      && service.after == [
        "guestagent-credentials.socket"
        "guestagent-credentials.target"
      ]
      && service.wants == service.after;
    "credentials: RefreshOnReload= where a reload is asked for, from systemd 260 on, unless the service has its own" =
      let
        setting =
          modules: credential:
          (guestAnd ([ web ] ++ modules) { credentials.db = credential // { services = [ "web" ]; }; })
          .systemd.services.web.serviceConfig.RefreshOnReload or null;
        onReload = modules: setting modules { onChange = "reload"; };
      in
      map (onChange: setting [ ] { inherit onChange; }) [
        null
        "none"
        "auto"
        "restart"
        "reload"
      ] == [
        null
        null
        "credentials"
        null
        "credentials"
      ]
      && map (unit: setting [ ] { reloadUnits = [ unit ]; }) [
        "web"
        "web.service"
        "nginx.service"
      ] == [
        "credentials"
        "credentials"
        null
      ]
      && map (version: onReload [ (systemdOf version) ]) [
        "259.9"
        "260"
        "261.1"
      ] == [
        null
        "credentials"
        "credentials"
      ]
      && onReload [ { systemd.services.web.serviceConfig.RefreshOnReload = "no"; } ] == "no";
    "credentials: a reload that would bring nothing gives a warning" =
      let
        warnings =
          version: credential:
          (guestAnd [ (systemdOf version) ] { credentials.db = credential // { services = [ "web" ]; }; })
          .warnings;
      in
      warnings "259.9" { onChange = "reload"; } == [
        "services.guestagent.credentials.db: web.service is to be reloaded when db changes, and would go on with the old value: only from systemd 260 on does a reload bring a new one. Set onChange = \"restart\""
      ]
      && warnings "260" { onChange = "reload"; } == [ ]
      && warnings "259.9" { onChange = "restart"; } == [ ];
    "credentials: what NixOS has no command for gets a drop-in, all else keeps its unit" =
      let
        services =
          (guestAnd
            [
              web
              { systemd.services."whole@1".serviceConfig.ExecStart = "/bin/whole"; }
              { systemd.services.stop.serviceConfig.ExecStop = "/bin/stop"; }
              { systemd.services."own@1".overrideStrategy = "asDropin"; }
            ]
            {
              credentials.db.services = [
                "web"
                "worker@1"
                "packaged.service"
                "whole@1"
                "stop"
                "own@1"
              ];
            }
          ).systemd.services;
      in
      lib.mapAttrs (_: s: s.overrideStrategy) (
        removeAttrs services [
          "guestagent"
          "guestagent-import"
          "guestagent-pull"
        ]
      ) == {
        "own@1" = "asDropin";
        packaged = "asDropin";
        stop = "asDropinIfExists";
        web = "asDropinIfExists";
        "whole@1" = "asDropinIfExists";
        "worker@1" = "asDropin";
      };
    "credentials: an instance's drop-in leaves the template's PATH alone, and one that somebody sets" =
      let
        services =
          (guestAnd
            [
              web
              {
                systemd.services."own@1".path = [ "/opt/own" ];
                systemd.services.packaged.path = [ "/opt/own" ];
              }
            ]
            {
              credentials.db.services = [
                "web"
                "worker@1"
                "own@1"
                "packaged"
              ];
            }
          ).systemd.services;
      in
      services.web.environment ? PATH
      && !(services."worker@1".environment ? PATH)
      && services."own@1".environment.PATH == "/opt/own/bin:/opt/own/sbin"
      && lib.hasPrefix "/opt/own/bin:" services.packaged.environment.PATH;
    "credentials: with auto, RefreshOnReload= where the process is told" =
      let
        setting =
          unit:
          (guestAnd [ { systemd.services.app.serviceConfig = unit; } ] {
            credentials.db = {
              services = [ "app" ];
              onChange = "auto";
            };
          }).systemd.services.app.serviceConfig.RefreshOnReload;
      in
      map setting [
        { ExecStart = "/bin/app"; }
        {
          ExecStart = "/bin/app";
          ExecReload = "/bin/reload";
        }
        {
          ExecStart = "/bin/app";
          Type = "notify-reload";
        }
        { }
      ] == [
        [ ]
        "credentials"
        "credentials"
        "credentials"
      ];
    "credentials: a reload is asked for by whichever entry of a name" =
      (guest {
        credentials.x = {
          name = "db";
          services = [ "one" ];
          onChange = "reload";
        };
        credentials.y = {
          name = "db";
          services = [ "two" ];
        };
      }).systemd.services.two.serviceConfig.RefreshOnReload == "credentials";
    "credentials: the path of one service, by either name" =
      map (service: (serving { services = [ service ]; }).services.guestagent.credentials.db.path) [
        "web"
        "web.service"
        "worker@1"
      ] == [
        "/run/credentials/web.service/db"
        "/run/credentials/web.service/db"
        "/run/credentials/worker@1.service/db"
      ];
    "credentials: the path for each of several services, by the name that was written" =
      (serving {
        name = "db-password";
        services = [
          "web"
          "worker@1.service"
        ];
      }).services.guestagent.credentials.db.pathFor == {
        web = "/run/credentials/web.service/db-password";
        "worker@1.service" = "/run/credentials/worker@1.service/db-password";
      };
    "credentials: other modules' options and units can have the path" =
      let
        system =
          guestAnd
            [
              (
                { config, ... }:
                let
                  inherit (config.services.guestagent.credentials) db;
                in
                {
                  options.services.web.passwordFile = lib.mkOption { type = lib.types.str; };
                  config.services.web.passwordFile = db.path;
                  config.systemd.services.web = {
                    environment.PASSWORD_FILE = config.services.web.passwordFile;
                    serviceConfig.ExecStart = "/bin/web ${db.pathFor.web}";
                  };
                }
              )
            ]
            {
              credentials.db = {
                services = [ "web" ];
                via = "socket";
              };
            };
        service = system.systemd.services.web;
      in
      service.environment.PASSWORD_FILE == "/run/credentials/web.service/db"
      && service.serviceConfig.ExecStart == "/bin/web /run/credentials/web.service/db"
      && service.overrideStrategy == "asDropinIfExists";
    "credentials: a name with what systemd expands" =
      let
        config =
          via:
          (serving {
            name = "a%b$c\"d'e";
            services = [ "web" ];
            inherit via;
          }).systemd.services.web.serviceConfig;
      in
      (config "path").LoadCredential == [ "a%%b$c\"d'e:/run/credstore/a%%b$c\"d'e" ]
      &&
        (config "socket").ExecStartPre == [
          "${pkgs.coreutils}/bin/test -s \${CREDENTIALS_DIRECTORY}/a%%b$$c\\\"d\\'e"
        ];
    "credentials: every name that a service can load" =
      (guestOf {
        credentials =
          lib.genAttrs
            [
              "A-z_.09"
              "!\"#$%&'()*+,-.;<=>?@[]^`{|}~"
              ".."
            ]
            (name: {
              name = "${name}x";
            });
      }).ok;
    "credentials: one name in two entries, for a service each" =
      let
        two = {
          credentials = {
            a = {
              name = "db";
              services = [ "web" ];
              restartUnits = [ "x" ];
            };
            b = {
              name = "db";
              services = [ "worker" ];
              via = "socket";
              onChange = "restart";
              restartUnits = [ "y.target" ];
            };
          };
        };
      in
      (guestOf two).ok
      && (settingsWith two).credentials == {
        db = {
          onChange = "restart";
          restartUnits = [
            "x.service"
            "y.target"
          ];
        };
      };
    "credentials: that their services are there is checked when the system is built" =
      let
        units = pkgs.hello;
        checks =
          (guestAnd [ { environment.etc."systemd/system".source = lib.mkForce units; } ] {
            credentials.db.services = [ "web" ];
          }).system.checks;
      in
      lib.length checks == 2 && (lib.elemAt checks 1).units == units;
    "credentials: without a service or a wish they change nothing" =
      settingsOf (serving { }) == settingsOf on
      && (serving { }).systemd.unitText == on.systemd.unitText;
    "credentials: a name of systemd's where the user lets the host set it" =
      lib.all (allow: (guestOf {
        credentials.key.name = "ssh.host";
        settings.names.allow = [ allow ];
      }).ok) [
        "ssh.host"
        "ssh.*"
        "*"
      ]
      && (guestOf {
        vsock.enable = false;
        credentials.key.name = "ssh.host";
      }).ok;
    "credentials: the names that are systemd's are the agent's" =
      agentsDeniedPrefixes != [ ]
      && lib.all (
        prefix: (guestOf { credentials."${prefix}x" = { }; }).failed != [ ]
      ) agentsDeniedPrefixes
      && lib.length agentsDeniedPrefixes == lib.length (
        builtins.split "\n    \"[a-z.]+\\.\"" (builtins.readFile ../../nixos/module.nix)
      ) / 2;
    "credentials: sops-nix in the guest may have its key in the store" =
      (nixos [
        ../../nixos/module.nix
        (sops true)
        { services.guestagent.enable = true; }
      ]).ok;

    "module: every option is described" =
      let
        undescribed =
          tree:
          lib.concatMap (
            o:
            if o._type or "" == "option" then
              lib.optional (o.description or "" == "") o
            else
              undescribed o
          ) (lib.attrValues tree);
      in
      undescribed (evaluate { }).options.services.guestagent == [ ];
  };

  refused = {
    "module: an option that does not exist" = {
      value = systemWith { services.guestagent.enabled = true; };
      message = "services.guestagent.enabled' does not exist";
    };
    "module: an option of a credential that does not exist" = {
      value = (serving { service = "web"; }).services.guestagent.credentials.db.name;
      message = "services.guestagent.credentials.db.service' does not exist";
    };
    "module: an option with a wrong value" = {
      value = settingsWith { credentials.db.onChange = "sometimes"; };
      message = "services.guestagent.credentials.db.onChange' is not of type `null or one of";
    };
    "module: an option of a wrong type" = {
      value = settingsWith { health.ignoreUnits = "web.service"; };
      message = "services.guestagent.health.ignoreUnits' is not of type `list of";
    };
    "module: a time that the agent does not take" = {
      value = settingsWith { provider.timeout = 366 * 24 * 60 * 60 + 1; };
      message = "services.guestagent.provider.timeout' is not of type `null or integer between";
    };
    "module: a port that anybody in the guest could listen on" = {
      value = (guest { vsock.port = 1024; }).systemd.sockets.guestagent.listenStreams;
      message = "services.guestagent.vsock.port' is not of type";
    };
    "module: a package that is none" = {
      value = (guest { package = "guestagent"; }).systemd.packages;
      message = "services.guestagent.package' is not of type `package'";
    };
    "settings: another value than the option's" = {
      value = settingsWith {
        smbios.enable = false;
        settings.smbios.read = "always";
      };
      message = "services.guestagent.settings.smbios.read' has conflicting definition values";
    };

    "credentials: the path is not the user's to set" = {
      value = (serving { path = "/run/db"; }).services.guestagent.credentials.db.path;
      message = "services.guestagent.credentials.db.path' is read-only";
    };
    "credentials: a path without a service" = {
      value = (serving { }).services.guestagent.credentials.db.path;
      message = "services.guestagent.credentials.db.path: no service loads it. Name the one that does";
    };
    "credentials: one path for two services" = {
      value =
        (serving {
          services = [
            "web"
            "worker"
          ];
        }).services.guestagent.credentials.db.path;
      message = "services.guestagent.credentials.db.path: 2 services load it, each from a path of its own. Take pathFor.";
    };
    "credentials: one path for all instances" = {
      value = (serving { services = [ "worker@" ]; }).services.guestagent.credentials.db.path;
      message = "worker@.service is a template, and each of its instances finds db at a path of its own";
    };
    "credentials: what has no name of a unit" = {
      value = (serving { services = [ "my web" ]; }).systemd.services;
      message = "is not of type";
    };
    "credentials: a unit that is no service" = {
      value = (guestOf { credentials.db.services = [ "web.socket" ]; }).ok;
      message = "services.guestagent.credentials.db.services: web.socket is not a service.";
    };
    "credentials: a name that systemd does not take" = {
      value = (guestOf { credentials."a/b" = { }; }).ok;
      message = "services.guestagent.credentials.a/b.name: no service could load a credential of that name.";
    };
    "credentials: a name with a space" = {
      value = (guestOf { credentials.db.name = "the db"; }).ok;
      message = "services.guestagent.credentials.db.name: no service could load a credential of that name.";
    };
    "credentials: a name with a backslash" = {
      value = (guestOf { credentials.db.name = "the\\db"; }).ok;
      message = "services.guestagent.credentials.db.name: no service could load a credential of that name.";
    };
    "credentials: a name that is too long" = {
      value = (guestOf { credentials.db.name = lib.concatStringsSep "" (lib.genList (_: "x") 256); }).ok;
      message = "services.guestagent.credentials.db.name: no service could load a credential of that name.";
    };
    "credentials: a name that is a folder" = {
      value = (guestOf { credentials.db.name = ".."; }).ok;
      message = "services.guestagent.credentials.db.name: no service could load a credential of that name.";
    };
    "credentials: a name on which systemd itself acts" = {
      value = (guestOf { credentials."ssh.host" = { }; }).ok;
      message = "services.guestagent.credentials.ssh.host.name: systemd itself acts on ssh.host";
    };
    "credentials: over the socket and not required" = {
      value =
        (guestOf {
          credentials.db = {
            required = false;
            via = "socket";
          };
        }).ok;
      message = "services.guestagent.credentials.db: over the socket a service waits until its credential is there";
    };
    "credentials: more than systemd tells over the socket" = {
      value =
        (guestOf {
          credentials.db = {
            name = lib.concatStringsSep "" (lib.genList (_: "x") 73);
            services = [ "web" ];
            via = "socket";
          };
        }).ok;
      message = "have more than 83 bytes together";
    };
    "credentials: one name twice in a service" = {
      value =
        (guestOf {
          credentials = {
            a = {
              name = "db";
              services = [ "web" ];
            };
            b = {
              name = "db";
              services = [ "web.service" ];
            };
          };
        }).ok;
      message = "services.guestagent.credentials.b: web.service would load db twice.";
    };
    "credentials: one that the unit loads from elsewhere, too" = {
      value =
        (nixos [
          ../../nixos/module.nix
          {
            services.guestagent.enable = true;
            services.guestagent.credentials.own.services = [ "web" ];
          }
          web
        ]).ok;
      message = "services.guestagent.credentials.own: web.service would load own twice.";
    };
    "credentials: two ways to refresh one" = {
      value = settingsWith {
        credentials = {
          a = {
            name = "db";
            onChange = "auto";
          };
          b = {
            name = "db";
            onChange = "restart";
          };
        };
      };
      message = "services.guestagent.settings.credentials.db.onChange' has conflicting definition values";
    };
    "provider: an address without vsock" = {
      value =
        (guestOf {
          vsock.enable = false;
          provider.address = "vsock:2";
        }).ok;
      message = "services.guestagent.provider.address: the provider hands over its credentials by calling the agent";
    };
    "provider: a boot that waits for nobody" = {
      value =
        (guestOf {
          vsock.enable = false;
          provider.holdBoot = true;
        }).ok;
      message = "services.guestagent.provider: holdBoot and required wait for a provider";
    };
    "provider: a target that nobody lets through" = {
      value =
        (guestOf {
          vsock.enable = false;
          provider.required = true;
        }).ok;
      message = "services.guestagent.provider: holdBoot and required wait for a provider";
    };
    "sops-nix: a key that is looked for before it comes" = {
      value =
        (nixos [
          ../../nixos/module.nix
          (sops false)
          { services.guestagent.enable = true; }
        ]).ok;
      message = "sops.age.keyFile: /run/credstore/age-key is there once units run, and sops-nix looks for it before.";
    };
  };

  text = {
    # The file of a system with every option and every setting.
    everySetting = everything.environment.etc."guestagent/config.json".source.text;
    # A configuration with a key ? in each group, and for each PATH: KEY, KEY… that should be known there instead.
    unknownKeys = builtins.toJSON (
      lib.mapAttrs (_: group: group // { "?" = 0; }) (removeAttrs everySetting [ "credentials" ])
      // {
        "?" = 0;
        credentials.db-password = everySetting.credentials.db-password // {
          "?" = 0;
        };
      }
    );
    knownKeys = lib.concatStringsSep "
" (
      lib.mapAttrsToList (path: group: "${path}?: ${lib.concatStringsSep ", " (lib.attrNames group)}") (
        {
          "" = everySetting;
          "credentials.db-password." = everySetting.credentials.db-password;
        }
        // lib.mapAttrs' (name: lib.nameValuePair "${name}.") (removeAttrs everySetting [ "credentials" ])
      )
    );
    # What is run when a system is built, and what it names: the file and the program.
    checkConfig = (lib.head on.system.checks).text;
    configFile = toString on.environment.etc."guestagent/config.json".source;
    program = "${on.services.guestagent.package}/bin/guestagent";
    # For web.service and worker@1.service; the units are in $units.
    checkServices =
      (lib.elemAt
        (serving {
          services = [
            "web"
            "worker@1"
          ];
        }).system.checks
        1
      ).text;
  };
}
