# tests/nix/check evaluates this with stand-ins, builds what the packages build, and runs their scripts. It has not been run
# with nixpkgs, nor the checks below: where the project is developed there is neither that nor a Nix store, and so there is
# no flake.lock.
{
  description = "Gets secrets from the host into a running VM's systemd credentials";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  outputs =
    { nixpkgs, self }:
    let
      forAllSystems =
        f:
        nixpkgs.lib.genAttrs [
          "x86_64-linux"
          "aarch64-linux"
        ] (system: f nixpkgs.legacyPackages.${system});
      # What `make demo` and `make test` need.
      tools = pkgs: [
        pkgs.cpio
        pkgs.debootstrap
        pkgs.gnumake
        pkgs.gnupg
        pkgs.go_1_26
        pkgs.nix
        pkgs.prometheus
        pkgs.qemu
        pkgs.shellcheck
        pkgs.systemd
        pkgs.vhost-device-vsock
        pkgs.zstd
      ];
    in
    {
      nixosModules = {
        default = ./nixos/module.nix;
        guest = ./nixos/module.nix;
        host = ./nixos/host.nix;
      };

      # A service of clan; docs/clan.md
      clan.modules.microvm = ./nixos/clan;

      overlays.default = import ./nixos/overlay.nix;

      # Apart, so that a guest has no more than the agent.
      packages = forAllSystems (pkgs: {
        default = pkgs.callPackage ./nixos/package.nix { };
        guestagent = pkgs.callPackage ./nixos/package.nix { };
        guestctl = pkgs.callPackage ./nixos/guestctl.nix { };
      });

      # nix run .#demo is `make demo`.
      apps = forAllSystems (pkgs: {
        demo = {
          type = "app";
          program = "${
            pkgs.writeShellApplication {
              name = "guestagent-demo";
              runtimeInputs = tools pkgs;
              # It builds in the folder of its sources.
              text = ''
                dir=$(mktemp -d)
                trap 'rm -rf "$dir"' EXIT
                cp -r ${self}/. "$dir"
                chmod -R u+w "$dir"
                make -C "$dir" demo
              '';
            }
          }/bin/guestagent-demo";
          meta.description = "Boots a VM and shows how secrets reach its services and change there";
        };
      });

      checks = forAllSystems (pkgs: {
        evaluation =
          let
            failed = import ./tests/nix/real.nix { inherit nixpkgs; };
          in
          if failed == [ ] then
            pkgs.emptyFile
          else
            throw "tests/nix/real.nix: ${nixpkgs.lib.concatStringsSep ", " failed}";
      }
      # Elsewhere the test's VM has no SMBIOS.
      // nixpkgs.lib.optionalAttrs pkgs.stdenv.hostPlatform.isx86_64 {
        vm = pkgs.testers.runNixOSTest ./tests/nix/vm-test.nix;
      });

      # nix develop -c make test
      devShells = forAllSystems (pkgs: {
        default = pkgs.mkShell { packages = tools pkgs; };
      });
    };
}
