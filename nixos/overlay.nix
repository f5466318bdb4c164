# The project's packages, as pkgs.guestagent and pkgs.guestctl.
final: _: {
  guestagent = final.callPackage ./package.nix { };
  guestctl = final.callPackage ./guestctl.nix { };
}
