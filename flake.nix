{
  description = "Gets secrets from the host into a running VM's systemd credentials";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  outputs =
    { nixpkgs, ... }:
    let
      forAllSystems =
        f:
        nixpkgs.lib.genAttrs [
          "x86_64-linux"
          "aarch64-linux"
        ] (system: f nixpkgs.legacyPackages.${system});
    in
    {
      nixosModules = {
        default = ./nixos/module.nix;
        guest = ./nixos/module.nix;
      };

      packages = forAllSystems (pkgs: {
        default = pkgs.callPackage ./nixos/package.nix { };
        guestagent = pkgs.callPackage ./nixos/package.nix { };
      });

      # What `make demo` and `make test` need: nix develop -c make demo
      devShells = forAllSystems (pkgs: {
        default = pkgs.mkShell {
          packages = [
            pkgs.cpio
            pkgs.debootstrap
            pkgs.gnumake
            pkgs.go_1_26
            pkgs.nix
            pkgs.prometheus
            pkgs.qemu
            pkgs.shellcheck
            pkgs.systemd
            pkgs.vhost-device-vsock
            pkgs.zstd
          ];
        };
      });
    };
}
