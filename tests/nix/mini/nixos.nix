# The parts of NixOS' option tree that the project's modules set, and the unit text NixOS would write, on ./lib.nix.
{ modules, lib ? import ./lib.nix, pkgsExtra ? (self: { }) }:
let
  inherit (lib) mkOption types concatStringsSep mapAttrsToList;
  stub = n: text: rec {
    type = "derivation"; name = n; pname = n; version = "0"; system = "x86_64-linux"; inherit text;
    outPath = "/nix/store/00000000000000000000000000000000-${n}"; drvPath = outPath + ".drv";
    meta.mainProgram = n; override = _: stub n text; overrideAttrs = _: stub n text;
  };
  pkgs = lib.fix (self: {
    inherit lib; system = "x86_64-linux"; bash = stub "bash" ""; coreutils = stub "coreutils" ""; systemd = stub "systemd" ""; jq = stub "jq" ""; curl = stub "curl" ""; socat = stub "socat" "";
    runtimeShell = "${self.bash}/bin/bash"; hello = stub "hello" "";
    writeText = stub; writeScript = stub; writeShellScript = n: t: stub n t; writeShellScriptBin = n: t: stub n t;
    writeShellApplication = { name, text, ... }: stub name text; writeTextFile = { name, text, ... }: stub name text;
    runCommand = n: _: t: stub n t; linkFarm = n: entries: assert lib.isAttrs entries; stub n "" // { inherit entries; }; mkShell = a: stub "nix-shell" "" // a;
    # the function form sees its own result, as finalAttrs
    buildGoModule = a: lib.fix (final: stub final.pname "" // (if lib.isFunction a then a final else a));
    callPackage = f: given: let fn = if lib.isFunction f then f else import f; in fn (builtins.intersectAttrs (builtins.functionArgs fn) self // given);
    formats.json = _: { type = types.attrsOf types.anything // { elem = types.anything; }; generate = n: v: stub n (builtins.toJSON v); };
    stdenv.hostPlatform = { isx86_64 = true; isAarch64 = false; isLinux = true; system = "x86_64-linux"; };
  } // pkgsExtra self);
  any = default: mkOption { type = types.anything; inherit default; };
  strs = mkOption { type = types.listOf types.str; default = [ ]; };
  unit = types.strMatching "[a-zA-Z0-9@%:_.\\-]+[.](service|socket|device|mount|automount|swap|target|path|timer|scope|slice)";
  units = mkOption { type = types.listOf unit; default = [ ]; };
  sect = mkOption { type = types.attrsOf types.unitOption; default = { }; };
  text = type: default: mkOption { inherit type default; };
  common = {
    enable = text types.bool true; description = text types.singleLineStr ""; documentation = strs;
    requires = units; wants = units; upholds = units; after = units; before = units; bindsTo = units; partOf = units; conflicts = units; requisite = units;
    onFailure = units; onSuccess = units; wantedBy = units; requiredBy = units; upheldBy = units; aliases = units; unitConfig = sect;
    restartTriggers = mkOption { type = types.listOf types.unspecified; default = [ ]; }; reloadTriggers = mkOption { type = types.listOf types.unspecified; default = [ ]; };
    overrideStrategy = text (types.enum [ "asDropinIfExists" "asDropin" ]) "asDropinIfExists";
    startLimitBurst = text (types.nullOr types.int) null; startLimitIntervalSec = text (types.nullOr types.int) null;
  };
  script = text types.lines "";
  svc = { options = common // {
    environment = mkOption { type = types.attrsOf (types.nullOr (types.oneOf [ types.str types.path types.package ])); default = { }; };
    path = mkOption { type = types.listOf (types.either types.package types.str); default = [ ]; };
    serviceConfig = sect; script = script; preStart = script; postStart = script; preStop = script; postStop = script; reload = script; scriptArgs = text types.str "";
    restartIfChanged = text types.bool true; reloadIfChanged = text types.bool false; stopIfChanged = text types.bool true; notSocketActivated = text types.bool false;
    startAt = any [ ];
  }; };
  other = key: { options = common // { ${key} = sect; listenStreams = strs; listenDatagrams = strs; }; };
  of = m: mkOption { type = types.attrsOf (types.submodule m); default = { }; };
  show = v: if v == true then "true" else if v == false then "false" else toString v;
  section = as: concatStringsSep "" (lib.concatLists (mapAttrsToList (n: v: map (x: "${n}=${show x}\n") (lib.toList v)) as));
  deps = c: lib.filterAttrs (_: v: v != "") {
    Requires = toString c.requires; Wants = toString c.wants; Upholds = toString c.upholds; After = toString c.after; Before = toString c.before; BindsTo = toString c.bindsTo;
    PartOf = toString c.partOf; Conflicts = toString c.conflicts; Requisite = toString c.requisite; OnFailure = toString c.onFailure; OnSuccess = toString c.onSuccess;
    Description = c.description; Documentation = toString c.documentation;
    StartLimitIntervalSec = lib.optionalString (c.startLimitIntervalSec != null) (toString c.startLimitIntervalSec);
    StartLimitBurst = lib.optionalString (c.startLimitBurst != null) (toString c.startLimitBurst);
  };
  install = c: lib.optionalString (c.wantedBy != [ ]) "\n[Install]\nWantedBy=${concatStringsSep " " c.wantedBy}\n";
  job = n: t: pkgs.writeShellScript n t;
  service = n: c: "[Unit]\n${section (deps c // c.unitConfig)}\n[Service]\n"
    + concatStringsSep "" (mapAttrsToList (k: v: lib.optionalString (v != null) "Environment=${builtins.toJSON "${k}=${toString v}"}\n") c.environment)
    + lib.optionalString (!c.restartIfChanged) "X-RestartIfChanged=false\n" + lib.optionalString (!c.stopIfChanged) "X-StopIfChanged=false\n"
    + section (c.serviceConfig // lib.optionalAttrs (c.script != "") { ExecStart = "${job "unit-script-${n}-start" c.script} ${c.scriptArgs}"; } // lib.optionalAttrs (c.preStart != "") { ExecStartPre = [ (job "unit-script-${n}-pre-start" c.preStart) ]; })
    + install c;
  socket = _: c: "[Unit]\n${section (deps c // c.unitConfig)}\n[Socket]\n${section c.socketConfig}"
    + concatStringsSep "" (map (s: "ListenStream=${s}\n") c.listenStreams) + concatStringsSep "" (map (s: "ListenDatagram=${s}\n") c.listenDatagrams) + install c;
  target = _: c: "[Unit]\n${section (deps c // c.unitConfig)}" + install c;
  base = { config, ... }: {
    options = {
      assertions = mkOption { type = types.listOf types.unspecified; default = [ ]; }; warnings = strs; lib = any { }; meta = any { };
      environment = { systemPackages = mkOption { type = types.listOf types.package; default = [ ]; }; etc = any { }; };
      boot = { kernelModules = strs; kernelParams = strs; initrd = { availableKernelModules = strs; kernelModules = strs; systemd = { enable = text types.bool true; services = of svc; storePaths = mkOption { type = types.listOf types.unspecified; default = [ ]; }; contents = any { }; }; }; };
      users.users = mkOption { default = { }; type = types.attrsOf (types.submodule { options = { isSystemUser = text types.bool false; isNormalUser = text types.bool false; group = text types.str ""; extraGroups = strs; uid = text (types.nullOr types.int) null; home = text types.str "/var/empty"; description = text types.str ""; }; }); };
      users.groups = mkOption { default = { }; type = types.attrsOf (types.submodule { options = { gid = text (types.nullOr types.int) null; members = strs; }; }); };
      networking.hostName = text types.str "nixos";
      security = any { };
      systemd = {
        services = of svc; sockets = of (other "socketConfig"); timers = of (other "timerConfig"); paths = of (other "pathConfig"); targets = of (other "targetConfig"); slices = of (other "sliceConfig");
        packages = mkOption { type = types.listOf types.package; default = [ ]; };
        tmpfiles.rules = strs; tmpfiles.settings = any { };
        unitText = mkOption { type = types.attrsOf types.str; default = { }; };
      };
    };
    config.systemd.unitText = lib.mapAttrs' (n: c: lib.nameValuePair "${n}.service" (service n c)) config.systemd.services
      // lib.mapAttrs' (n: c: lib.nameValuePair "${n}.socket" (socket n c)) config.systemd.sockets
      // lib.mapAttrs' (n: c: lib.nameValuePair "${n}.target" (target n c)) config.systemd.targets;
  };
  r = lib.evalModules { modules = [ base ] ++ modules; specialArgs = { inherit pkgs; modulesPath = "/nixpkgs/nixos/modules"; }; };
  failed = map (a: a.message) (lib.filter (a: !a.assertion) r.config.assertions);
in r // { inherit pkgs lib failed; ok = if failed == [ ] then true else builtins.throw "Failed assertions:\n${concatStringsSep "\n" (map (m: "- ${m}") failed)}"; }
