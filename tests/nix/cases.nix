# What tests/nix/check evaluates: the cases of all parts.
#   holds.NAME    is true
#   refused.NAME  has a value that cannot be evaluated, and the message that says why
#   text.NAME     is a string that check works on
# A part is a function of lib and of `nixos`, which evaluates a list of modules with mini/nixos.nix.
let
  lib = import ./mini/lib.nix;
  nixos = modules: import ./mini/nixos.nix { inherit modules; };
  parts = map (part: import part { inherit lib nixos; }) [
    ./clan.nix
    ./guest.nix
    ./host.nix
    ./package.nix
    ./reference.nix
  ];
  merge =
    kind:
    builtins.foldl' (
      all: part:
      let
        more = part.${kind} or { };
        twice = builtins.attrNames (builtins.intersectAttrs all more);
      in
      if twice != [ ] then throw "tests/nix: ${kind}.${builtins.head twice} is there twice" else all // more
    ) { } parts;
in
lib.genAttrs [
  "holds"
  "refused"
  "text"
] merge
