# What tests/nix/check evaluates, one attribute at a time.
#   holds.NAME    is true
#   refused.NAME  has a value that cannot be evaluated, and the message that says why
#   text.NAME     is a string that check works on
let
  lib = import ./mini/lib.nix;
  systemWith = settings: (evaluate settings).config;
  evaluate =
    settings:
    import ./mini/nixos.nix {
      modules = [
        ../../nixos/module.nix
        settings
      ];
      pkgsExtra = shellPackages;
    };
  # What the development shell has and mini/nixos.nix lacks.
  shellPackages =
    self:
    lib.genAttrs [
      "cpio"
      "debootstrap"
      "gnumake"
      "go_1_26"
      "nix"
      "prometheus"
      "qemu"
      "shellcheck"
      "vhost-device-vsock"
      "zstd"
    ] (name: self.hello // { pname = name; });

  on = systemWith { services.guestagent.enable = true; };
  off = systemWith { };
  bare = (import ./mini/nixos.nix { modules = [ ]; }).config;
  inherit ((evaluate { })) pkgs;

  package = pkgs.callPackage ../../nixos/package.nix { };
  onWith =
    settings:
    systemWith {
      services.guestagent = {
        enable = true;
        inherit settings;
      };
    };
  configWith =
    settings:
    builtins.fromJSON (onWith settings).environment.etc."guestagent/config.json".source.text;
  compare = value: onWith { consumers.compare = value; };
  holdBoot =
    value:
    systemWith {
      services.guestagent = {
        enable = true;
        provider.holdBoot = value;
      };
    };
  # Every key that the agent knows, none with its default.
  everySetting = {
    consumers.compare = true;
    credentials.db-password = {
      onChange = "auto";
      reloadUnits = [ "nginx.service" ];
      restartUnits = [ "pgbouncer.service" ];
    };
    names.allow = [ "ssh.*" ];
    peer.privilegedPort = "ignored";
    policy.load."db-*" = [ "web.service" ];
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
    previous.ttl = 3600;
    provider = {
      address = "vsock:2:1020";
      required = true;
      timeout = 120;
    };
    refresh.never = [ "postgresql.service" ];
    smbios.read = "never";
    socket.wait = 300;
  };

  systems = [
    "aarch64-linux"
    "x86_64-linux"
  ];
  flake = (import ../../flake.nix).outputs {
    self = { };
    nixpkgs = {
      inherit lib;
      legacyPackages = lib.genAttrs systems (_: pkgs);
    };
  };
in
{
  holds = {
    "module: disabled, it sets nothing" =
      removeAttrs off [ "services" ] == removeAttrs bare [ "services" ];
    "module: no assertion fails" = (evaluate { services.guestagent.enable = true; }).ok;
    "module: systemd gets the package's units" =
      map (p: p.pname) on.systemd.packages == [ "guestagent" ];
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
      && lib.all (s: s.socketConfig == { } && s.listenStreams == [ ]) (lib.attrValues on.systemd.sockets);
    "module: it adds to the target" =
      lib.attrNames on.systemd.targets == [ "guestagent-credentials" ]
      && lib.all (t: t.unitConfig == { } && t.targetConfig == { }) (lib.attrValues on.systemd.targets);
    "module: the program is in the path" =
      map (p: p.pname) on.environment.systemPackages == [ "guestagent" ];
    "module: another package can be given" =
      let
        other = systemWith {
          services.guestagent = {
            enable = true;
            package = pkgs.hello;
          };
        };
      in
      other.systemd.packages == [ pkgs.hello ]
      && other.environment.systemPackages == [ pkgs.hello ];
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
    "module: what nobody sets is not in the configuration file" = configWith { } == { };
    "module: the configuration file with every setting" = configWith everySetting == everySetting;
    "module: an empty list is a setting" =
      configWith {
        policy.load."*" = [ ];
        refresh.never = [ ];
      } == {
        policy.load."*" = [ ];
        refresh.never = [ ];
      };
    "module: the drop-in of consumers.compare with it alone" =
      map (p: p.pname) (compare true).systemd.packages == [
        "guestagent"
        "guestagent-compare"
      ]
      && map (p: p.pname) (compare false).systemd.packages == [ "guestagent" ];
    "module: the drop-in of provider.holdBoot with it alone" =
      map (p: p.pname) (holdBoot true).systemd.packages == [
        "guestagent"
        "guestagent-hold-boot"
      ]
      && map (p: p.pname) (holdBoot false).systemd.packages == [ "guestagent" ];
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

    "package: what is built, and how" =
      package.subPackages == [ "cmd/guestagent" ]
      && package.env.CGO_ENABLED == 0
      &&
        package.ldflags == [
          "-s"
          "-w"
          "-X main.version=${package.version}"
        ];
    "package: it has a name, a licence and a program" =
      package.pname == "guestagent"
      && package.meta.mainProgram == "guestagent"
      && package.meta.license == lib.licenses.asl20
      && package.meta.platforms == lib.platforms.linux;
    "package: a hash for the dependencies" =
      builtins.match "sha256-[A-Za-z0-9+/]{43}=" package.vendorHash != null;

    "flake: both systems, the agent by both names" =
      lib.attrNames flake.packages == systems
      && lib.all (
        s: s.default.pname == "guestagent" && s.guestagent.pname == "guestagent"
      ) (lib.attrValues flake.packages);
    "flake: a shell for make demo and make test" = lib.all (
      s: lib.all lib.isDerivation s.default.packages
    ) (lib.attrValues flake.devShells);
    "flake: the module by both names" = lib.all (
      m:
      lib.hasAttr "guestagent"
        (import ./mini/nixos.nix { modules = [ m ]; }).config.services
    ) [
      flake.nixosModules.default
      flake.nixosModules.guest
    ];
    "flake: nixpkgs is the only input" =
      lib.attrNames (import ../../flake.nix).inputs == [ "nixpkgs" ];
  };

  refused = {
    "module: an option that does not exist" = {
      value = systemWith { services.guestagent.enabled = true; };
      message = "services.guestagent.enabled' does not exist";
    };
    "module: a setting that does not exist" = {
      value = configWith { smbios.reed = "auto"; };
      message = "services.guestagent.settings.smbios.reed' does not exist";
    };
    "module: a setting of a credential that does not exist" = {
      value = configWith { credentials.db-password.onchange = "auto"; };
      message = "services.guestagent.settings.credentials.db-password.onchange' does not exist";
    };
    "module: a setting with a wrong value" = {
      value = configWith { smbios.read = "sometimes"; };
      message = "services.guestagent.settings.smbios.read' is not of type `null or one of";
    };
    "module: a setting of a wrong type" = {
      value = configWith { policy.load.db-password = "web.service"; };
      message = "services.guestagent.settings.policy.load.db-password' is not of type `list of";
    };
    "module: a time that the agent does not take" = {
      value = configWith { socket.wait = 366 * 24 * 60 * 60 + 1; };
      message = "services.guestagent.settings.socket.wait' is not of type `null or integer between";
    };
    "module: a package that is none" = {
      value =
        (systemWith {
          services.guestagent = {
            enable = true;
            package = "guestagent";
          };
        }).systemd.packages;
      message = "services.guestagent.package' is not of type `package'";
    };
  };

  text = {
    inherit (package) postInstall vendorHash version;
    ldflags = lib.concatStringsSep " " package.ldflags;
    sources = lib.concatMapStringsSep "\n" toString package.src.fileset;
    everySetting = builtins.toJSON everySetting;
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
    knownKeys = lib.concatStringsSep "\n" (
      lib.mapAttrsToList (path: group: "${path}?: ${lib.concatStringsSep ", " (lib.attrNames group)}") (
        {
          "" = everySetting;
          "credentials.db-password." = everySetting.credentials.db-password;
        }
        // lib.mapAttrs' (name: lib.nameValuePair "${name}.") (removeAttrs everySetting [ "credentials" ])
      )
    );
    # FILE TARGET, for each link that consumers.compare and provider.holdBoot bring. A TARGET is relative to the package.
    dropInLinks = lib.concatStringsSep "\n" (
      lib.concatMap
        (
          system:
          lib.mapAttrsToList (file: target: "${file} ${lib.removePrefix "${package}/" target}") (
            lib.elemAt system.systemd.packages 1
          ).entries
        )
        [
          (compare true)
          (holdBoot true)
        ]
    );
    # What NixOS would write to each unit's overrides.conf, but for the restart triggers.
    overrides = on.systemd.unitText;
    # UNIT TARGET, for each unit that the module has a target pull in.
    wantedBy = lib.concatStringsSep "\n" (
      lib.concatLists (
        lib.mapAttrsToList (
          type: units:
          lib.concatLists (
            lib.mapAttrsToList (
              name: unit: map (target: "${name}.${lib.removeSuffix "s" type} ${target}") unit.wantedBy
            ) units
          )
        ) { inherit (on.systemd) services sockets targets; }
      )
    );
  };
}
