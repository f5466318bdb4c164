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
  configWith =
    settings:
    builtins.fromJSON
      (systemWith {
        services.guestagent = {
          enable = true;
          inherit settings;
        };
      }).environment.etc."guestagent/config.json".source.text;

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
    "module: it adds to the import unit and defines no unit of its own" =
      lib.attrNames on.systemd.services == [ "guestagent-import" ]
      && on.systemd.services.guestagent-import.serviceConfig == { }
      && on.systemd.services.guestagent-import.overrideStrategy == "asDropinIfExists";
    "module: it adds to the sockets" =
      lib.attrNames on.systemd.sockets == [
        "guestagent"
        "guestagent-local"
      ]
      && lib.all (s: s.socketConfig == { } && s.listenStreams == [ ]) (lib.attrValues on.systemd.sockets);
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
    "module: the configuration file by default" = 
      configWith { } == {
        names.allow = [ ];
        peer.privilegedPort = "required";
        smbios.read = "auto";
      };
    "module: the configuration file with a setting" =
      configWith {
        names.allow = [ "ssh.*" ];
        peer.privilegedPort = "ignored";
        smbios.read = "never";
      } == {
        names.allow = [ "ssh.*" ];
        peer.privilegedPort = "ignored";
        smbios.read = "never";
      };
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
    "module: a setting with a wrong value" = {
      value = configWith { smbios.read = "sometimes"; };
      message = "services.guestagent.settings.smbios.read' is not of type `one of";
    };
    "module: a setting of a wrong type" = {
      value = configWith { smbios.read = true; };
      message = "services.guestagent.settings.smbios.read' is not of type `one of";
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
    # What NixOS would write to guestagent-import.service.d/overrides.conf.
    importDropIn = on.systemd.unitText."guestagent-import.service";
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
