# What tests/nix/render writes for a NixOS module, as lines of shell: COMMAND ARGUMENT…
module:
let
  lib = import ./mini/lib.nix;
  inherit (lib) escapeShellArgs;
  system = import ./mini/nixos.nix {
    modules = [
      { _file = "tests/nix/render"; }
    ]
    ++ builtins.filter builtins.pathExists [
      ../../nixos/module.nix
      ../../nixos/host.nix
      ./microvm.nix
    ]
    ++ [ module ];
  };
  inherit (system) config;

  packages = lib.concatMap (
    package:
    if package ? entries then
      lib.mapAttrsToList (
        file: target:
        escapeShellArgs [
          "drop_in"
          file
          "${target}"
        ]
      ) package.entries
    else
      [
        (escapeShellArgs [
          "package"
          package.pname
        ])
      ]
  ) config.systemd.packages;

  # Whole units come last in NixOS only if no package has them: render looks.
  units = lib.mapAttrsToList (
    name: unit:
    escapeShellArgs (
      if unit.enable then
        [
          "unit"
          name
          unit.overrideStrategy
          unit.text
        ]
      else
        [
          "mask"
          name
        ]
    )
  ) config.systemd.units;

  links = lib.concatLists (
    lib.mapAttrsToList (
      name: unit:
      map (
        alias:
        escapeShellArgs [
          "link"
          alias
          name
        ]
      ) unit.aliases
      ++ lib.concatLists (
        lib.mapAttrsToList
          (
            kind:
            map (
              target:
              escapeShellArgs [
                "link"
                "${target}.${kind}/${name}"
                "../${name}"
              ]
            )
          )
          {
            wants = unit.wantedBy;
            requires = unit.requiredBy;
            upholds = unit.upheldBy;
          }
      )
    ) config.systemd.units
  );

  # As NixOS does, a path that is a string is linked to, wherever it leads.
  etc = lib.concatLists (
    lib.mapAttrsToList (
      name: file:
      lib.optional file.enable (
        escapeShellArgs (
          if file.text == null && lib.isString file.source then
            [
              "etc_link"
              (targetOf name file)
              file.source
            ]
          else
            [
              "etc"
              (targetOf name file)
              (
                if file.text != null then
                  file.text
                else if file.source == null then
                  throw "environment.etc.\"${name}\" has neither text nor source"
                else
                  file.source.text or (builtins.readFile file.source)
              )
            ]
        )
      )
    ) config.environment.etc
  );
  targetOf = name: file: if file.target == "" then name else file.target;

  warnings = map (
    warning:
    escapeShellArgs [
      "warn"
      warning
    ]
  ) config.warnings;
in
if system.ok then lib.concatStringsSep "\n" (warnings ++ packages ++ units ++ links ++ etc) else ""
