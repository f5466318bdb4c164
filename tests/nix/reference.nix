# The documentation: docs/nixos-options.md, as it has to be, from what the options of both modules say of themselves; and the
# messages of an evaluation that docs/nixos.md explains.
{ lib, nixos }:
let
  guestWith =
    settings:
    nixos [
      ../../nixos/module.nix
      { services.guestagent.enable = true; }
      settings
    ];
  hostWith =
    web:
    nixos [
      ./microvm.nix
      ../../nixos/host.nix
      {
        microvm.vms.web.config = web;
        services.guestagent.vms.web = { };
      }
    ];
  explained = {
    "a credential that the host lacks" = {
      value =
        (hostWith {
          microvm.vsock.cid = 3;
          services.guestagent.credentials.db-password.services = [ "app" ];
        }).ok;
      message = "services.guestagent.vms.web.credentials: the guest requires db-password, which nobody hands over.";
    };
    "a VM without a CID" = {
      value = (hostWith { }).ok;
      message = "services.guestagent.vms.web: nothing says how the guest is reached.";
    };
    "the path of two services" = {
      value =
        (guestWith {
          services.guestagent.credentials.db-password.services = [
            "app"
            "worker"
          ];
        }).config.services.guestagent.credentials.db-password.path;
      message = "services.guestagent.credentials.db-password.path: 2 services load it, each from a path of its own.";
    };
    "sops-nix before systemd" = {
      value =
        (guestWith {
          options.sops = lib.mkOption { type = lib.types.anything; };
          config.sops.age.keyFile = "/run/credstore/age-key";
        }).ok;
      message = "sops.age.keyFile: /run/credstore/age-key is there once units run, and sops-nix looks for it before.";
    };
  };
  guide = builtins.readFile ../../docs/nixos.md;

  optionsOf = module: (nixos [ module ]).options.services.guestagent;
  guest = optionsOf ../../nixos/module.nix;
  host = optionsOf ../../nixos/host.nix;

  clan = (lib.evalModules { modules = [ ../../nixos/clan/interface.nix ]; }).options;

  # The options of a tree and of the submodules in it, each before those below it.
  documented =
    tree:
    lib.concatMap (
      name:
      let
        value = tree.${name};
      in
      if name == "_module" then
        [ ]
      else if value._type or "" != "option" then
        documented value
      else if value.internal or false || !(value.visible or true) then
        [ ]
      else
        [ value ]
        ++ lib.optionals (value.type ? getSubOptions) (
          documented (value.type.getSubOptions value.loc)
        )
    ) (lib.attrNames tree);

  identifier = name: builtins.match "[a-zA-Z_][a-zA-Z0-9_'-]*" name != null;
  attribute = name: if identifier name then name else builtins.toJSON name;
  # A value as one would write it.
  literal =
    indent: value:
    let
      inner = indent + "  ";
      block =
        open: lines: close:
        "${open}\n${lib.concatMapStringsSep "" (l: "${inner}${l}\n") lines}${indent}${close}";
    in
    if value._type or "" == "literalExpression" then
      value.text
    else if lib.isList value then
      if value == [ ] then
        "[ ]"
      else if lib.all (v: !(lib.isAttrs v || lib.isList v)) value then
        "[ ${lib.concatMapStringsSep " " (literal inner) value} ]"
      else
        block "[" (map (literal inner) value) "]"
    else if lib.isAttrs value then
      if value == { } then
        "{ }"
      else
        block "{" (lib.mapAttrsToList (n: v: "${attribute n} = ${literal inner v};") value) "}"
    else if value == null then
      "null"
    else
      builtins.toJSON value;
  isShort = text: builtins.match "[^\n]*" text != null;

  # What stands behind a label: text that is Markdown already, or Nix.
  shown =
    label: value:
    let
      text = lib.removeSuffix "\n" (literal "" value);
    in
    if value._type or "" == "literalMD" then
      "- ${label}: ${value.text}\n"
    else if isShort text then
      "- ${label}: `${text}`\n"
    else
      "- ${label}:\n\n  ```\n  ${builtins.replaceStrings [ "\n" ] [ "\n  " ] text}\n  ```\n";

  option = o: ''
    ### `${lib.concatMapStringsSep "." (n: if n == "<name>" || n == "*" then n else attribute n) o.loc}`

    ${lib.removeSuffix "\n" (o.description or (throw "${toString o.loc} has no description"))}

    - Type: `${o.type.description}`${lib.optionalString (o.readOnly or false) ", read-only"}
    ${lib.optionalString (o ? defaultText || o ? default) (
      shown "Default" (o.defaultText or o.default)
    )}${lib.optionalString (o ? example) (shown "Example" o.example)}'';
  section = options: lib.concatMapStringsSep "\n" option (documented options);
in
{
  holds = lib.mapAttrs' (
    name: case:
    lib.nameValuePair "docs: ${name} is explained" (lib.hasInfix "`${case.message}`" guide)
  ) explained;
  refused = lib.mapAttrs' (name: lib.nameValuePair "docs: ${name}") explained;

  text.optionsReference = lib.removeSuffix "\n" ''
    # The options of the NixOS modules and of the clan service

    Generated from the modules by `tests/nix/reference --update`; `make test` fails where it is stale. [nixos.md](nixos.md) says what they are for.

    ## In the guest: `nixosModules.guest`

    ${section guest}
    ## On the host: `nixosModules.host`

    ${section host}
    ## The clan service: `roles.server`

    These are settings of an instance, and [clan.md](clan.md) says how they are written. Role `guest` has none.

    ${section clan}'';
}
