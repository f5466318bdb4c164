# The modules with the real NixOS, where there is a <nixpkgs>: the names of what does not hold, so that [ ] is good.
#
#   nix-instantiate --eval --strict -E 'import ./tests/nix/real.nix { }'
#
# It has not been run with a whole nixpkgs. What has been: this file, with nixpkgs' library, its options for units and
# the texts it makes of them, and stand-ins for its packages and its other modules; and with all of microvm.nix. What a
# whole nixpkgs adds to that, such as instantiating the packages and a system, is untried.
{
  nixpkgs ? <nixpkgs>,
  # The folder of microvm.nix. Without it, ./microvm.nix stands for it.
  microvm ? null,
}:
let
  lib = import (nixpkgs + "/lib");

  evaluate =
    modules:
    import (nixpkgs + "/nixos/lib/eval-config.nix") {
      system = null;
      modules = [
        {
          # The least that NixOS takes: neither a boot loader nor file systems.
          boot.isContainer = true;
          nixpkgs.hostPlatform = "x86_64-linux";
          system.stateVersion = lib.trivial.release;
        }
      ]
      ++ modules;
    };

  guestModule = ../../nixos/module.nix;
  hostModule = ../../nixos/host.nix;
  goldenGuest = [
    guestModule
    ./golden/guest.nix
  ];
  goldenHost = microvmModule: [
    hostModule
    microvmModule
    ./golden/host.nix
  ];
  modules = [
    guestModule
    hostModule
  ];

  systems = {
    guest = evaluate goldenGuest;
    host = evaluate (
      goldenHost (if microvm == null then ./microvm.nix else microvm + "/nixos-modules/host")
    );
    both = evaluate (
      modules
      ++ [
        {
          services.guestagent.enable = true;
          services.guestagent.vms.web.cid = 3;
        }
      ]
    );
  };
  # The modules are there, and nothing of them is enabled.
  idle = evaluate modules;
  bare = evaluate [ ];
  faulty = evaluate (
    modules
    ++ [
      {
        services.guestagent = {
          enable = true;
          credentials.db = {
            via = "socket";
            required = false;
          };
          vms.web = { };
        };
      }
    ]
  );
  failedIn = system: map (a: a.message) (lib.filter (a: !a.assertion) system.config.assertions);
  faults = option: lib.filter (lib.hasPrefix "services.guestagent.${option}: ") (failedIn faulty);

  undocumented =
    system:
    lib.filter
      (
        option:
        !(
          lib.isString (option.description or null)
          && lib.isString (option.type or null)
          # A default that is made from other options cannot be shown.
          && builtins.deepSeq (option.default or null) true
        )
      )
      (
        lib.filter (option: option.visible && !option.internal) (
          lib.optionAttrSetToDocList system.options.services.guestagent
        )
      );

  # What a unit says, less what NixOS adds to every one, with each package under its name alone.
  said =
    text:
    map
      (
        line:
        lib.concatMapStrings (part: if lib.isList part then "/nix/store/${lib.head part}" else part) (
          builtins.split "/nix/store/[0-9a-z]{32}-([a-z]+)[^/ ]*" line
        )
      )
      (
        lib.filter (
          line:
          line != ""
          && !(lib.any (prefix: lib.hasPrefix prefix line) [
            "Environment=\"LOCALE_ARCHIVE="
            "Environment=\"PATH="
            "Environment=\"TZDIR="
            "X-Restart-Triggers="
            "[Install]"
            "WantedBy="
          ])
        ) (lib.splitString "\n" text)
      );
  unitOf =
    system: name:
    let
      unit = system.config.systemd.units.${name};
    in
    {
      inherit (unit)
        aliases
        enable
        overrideStrategy
        requiredBy
        wantedBy
        ;
      text = said unit.text;
    };
  # The other tests work on what mini/ renders.
  renderedAsMiniDoes =
    kind: modules:
    let
      real = evaluate modules;
      # What is rendered depends on systemd's version.
      mini = import ./mini/nixos.nix {
        modules = modules ++ [
          ({ pkgs, ... }: { systemd.package = pkgs.systemd // { inherit (real.config.systemd.package) version; }; })
        ];
      };
    in
    lib.mapAttrs' (
      name: _:
      lib.nameValuePair "${kind}: NixOS makes the same of ${name} as mini" (
        unitOf real name == unitOf mini name
      )
    ) mini.config.systemd.units;

  holds =
    lib.concatMapAttrs (kind: system: {
      "${kind}: no assertion fails" = failedIn system == [ ];
      "${kind}: every option is documented" = undocumented system == [ ];
      "${kind}: the system can be instantiated" =
        lib.isString system.config.system.build.toplevel.drvPath;
    }) systems
    // renderedAsMiniDoes "guest" goldenGuest
    // renderedAsMiniDoes "host" (goldenHost ./microvm.nix)
    // {
      "idle: it adds nothing" =
        lib.attrNames idle.config.systemd.units == lib.attrNames bare.config.systemd.units
        && lib.attrNames idle.config.environment.etc == lib.attrNames bare.config.environment.etc
        && map toString idle.config.systemd.packages == map toString bare.config.systemd.packages
        && !(idle.config.users.groups ? guestagent);
      "faulty: each module refuses its fault" =
        lib.length (faults "credentials.db") == 1 && lib.length (faults "vms.web") == 1;
      "guest: its configuration is checked with the system" = lib.any (
        check: lib.hasInfix "guestagent-check-config" check.name
      ) systems.guest.config.system.checks;
    };
in
lib.attrNames (lib.filterAttrs (_: held: !held) holds)
