# The packages and the flake.
{ lib, nixos }:
let
  # What the development shell has and mini/nixos.nix lacks.
  shellPackages =
    self:
    lib.genAttrs [
      "cpio"
      "debootstrap"
      "gnumake"
      "gnupg"
      "go_1_26"
      "nix"
      "prometheus"
      "qemu"
      "shellcheck"
      "vhost-device-vsock"
      "zstd"
    ] (name: self.hello // { pname = name; })
    // {
      testers.runNixOSTest = test: self.hello // { test = import test; };
    };
  inherit ((import ./mini/nixos.nix {
    modules = [ ];
    pkgsExtra = shellPackages;
  })) pkgs;

  programs = lib.genAttrs [ "guestagent" "guestctl" ] (
    name: pkgs.callPackage (../../nixos + "/${if name == "guestagent" then "package" else name}.nix") { }
  );
  all = lib.attrValues programs;
  root = toString ../..;
  # The files of a source, relative to the project's folder.
  sources = src: lib.concatMapStringsSep "\n" (file: lib.removePrefix "${root}/" (toString file)) src.fileset;

  systems = [
    "aarch64-linux"
    "x86_64-linux"
  ];
  flake = (import ../../flake.nix).outputs {
    self.outPath = "/nix/store/00000000000000000000000000000000-source";
    nixpkgs = {
      inherit lib;
      legacyPackages = lib.genAttrs systems (
        system:
        pkgs
        // {
          stdenv = pkgs.stdenv // {
            hostPlatform = pkgs.stdenv.hostPlatform // {
              inherit system;
              isx86_64 = system == "x86_64-linux";
            };
          };
        }
      );
    };
  };
in
{
  holds = {
    "packages: what is built, and how" = lib.all (
      name:
      let
        program = programs.${name};
      in
      program.pname == name
      && program.subPackages == [ "cmd/${name}" ]
      && program.env.CGO_ENABLED == 0
      &&
        program.ldflags == [
          "-s"
          "-w"
          "-X main.version=${program.version}"
        ]
    ) (lib.attrNames programs);
    "packages: each has a license, a program and a description of its own" =
      lib.all (
        program:
        program.meta.mainProgram == program.pname
        && program.meta.license == lib.licenses.asl20
        && program.meta.platforms == lib.platforms.linux
      ) all
      && lib.length (lib.unique (map (program: program.meta.description) all)) == 2;
    "packages: one hash for the dependencies of both" =
      builtins.match "sha256-[A-Za-z0-9+/]{43}=" programs.guestagent.vendorHash != null
      && programs.guestagent.vendorHash == programs.guestctl.vendorHash
      &&
        programs.guestagent.overrideModAttrs { } == programs.guestctl.overrideModAttrs { };
    "packages: where guestctl cannot run, it writes nothing" =
      let
        cross = pkgs.callPackage ../../nixos/guestctl.nix {
          stdenv = pkgs.stdenv // {
            buildPlatform.canExecute = _: false;
          };
        };
      in
      lib.hasInfix "/bin/guestctl\" man" programs.guestctl.postInstall
      && !(lib.hasInfix "/bin/guestctl\" " cross.postInstall)
      && lib.hasPrefix cross.postInstall programs.guestctl.postInstall;

    "flake: both systems, and the agent by default" =
      lib.attrNames flake.packages == systems
      && lib.all (
        s:
        lib.mapAttrs (_: package: package.pname) s == {
          default = "guestagent";
          guestagent = "guestagent";
          guestctl = "guestctl";
        }
      ) (lib.attrValues flake.packages);
    "flake: the overlay has the same packages" =
      let
        added = flake.overlays.default pkgs { };
      in
      lib.attrNames added == [
        "guestagent"
        "guestctl"
      ]
      && added.guestagent.src == programs.guestagent.src
      && added.guestctl.src == programs.guestctl.src;
    "flake: the demo is an app" = lib.all (
      s: s.demo.type == "app" && lib.hasSuffix "/bin/guestagent-demo" s.demo.program
    ) (lib.attrValues flake.apps);
    "flake: the checks, on ARM without a VM, which would have no SMBIOS" =
      lib.attrNames flake.checks.x86_64-linux == [
        "evaluation"
        "vm"
      ]
      && lib.isDerivation flake.checks.x86_64-linux.vm
      && lib.attrNames flake.checks.aarch64-linux == [ "evaluation" ];
    # Its script is nixpkgs' to run; here its guest is evaluated.
    "flake: the guest of the NixOS test has what the test uses" =
      let
        test = flake.checks.x86_64-linux.vm.test;
        guest = nixos [
          test.nodes.guest
          {
            options.virtualisation.qemu.options = lib.mkOption { type = lib.types.listOf lib.types.str; };
            options.specialisation = lib.mkOption { type = lib.types.anything; };
            options.system.switch.enable = lib.mkOption { type = lib.types.bool; };
          }
        ];
        switched = nixos [
          guest.config.specialisation.other.configuration
          ../../nixos/module.nix
        ];
      in
      guest.ok
      && switched.ok
      && guest.config.environment.etc.api-key.source == "/run/credentials/consumer.service/api-key"
      && lib.isString test.testScript;
    "flake: a shell for make demo and make test" = lib.all (
      s: lib.all lib.isDerivation s.default.packages
    ) (lib.attrValues flake.devShells);
    "flake: the modules" =
      flake.nixosModules.default == flake.nixosModules.guest
      && lib.all (m: lib.hasAttr "guestagent" (nixos [ m ]).config.services) (
        lib.attrValues flake.nixosModules
      );
    "flake: nixpkgs is the only input" =
      lib.attrNames (import ../../flake.nix).inputs == [ "nixpkgs" ];
  };

  text = {
    inherit (programs.guestagent) vendorHash version;
    moduleSources = sources (programs.guestagent.overrideModAttrs { }).src;
  }
  // lib.mapAttrs' (
    name: program:
    lib.nameValuePair "program ${name}" (
      lib.escapeShellArgs [
        (lib.concatStringsSep " " program.ldflags)
        program.postInstall
        (sources program.src)
      ]
    )
  ) programs;
}
