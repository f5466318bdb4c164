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
    inherit lib; system = "x86_64-linux"; bash = stub "bash" ""; coreutils = stub "coreutils" ""; findutils = stub "findutils" ""; gnugrep = stub "gnugrep" ""; gnused = stub "gnused" ""; systemd = stub "systemd" ""; jq = stub "jq" ""; curl = stub "curl" ""; socat = stub "socat" "";
    runtimeShell = "${self.bash}/bin/bash"; hello = stub "hello" ""; mkpasswd = stub "mkpasswd" ""; openssl = stub "openssl" ""; shadow = stub "shadow" "";
    writeText = stub; writeScript = stub; writeShellScript = n: t: stub n t; writeShellScriptBin = n: t: stub n t;
    writeShellApplication = { name, text, ... }: stub name text; writeTextFile = { name, text, ... }: stub name text;
    runCommand = n: env: t: stub n t // env; linkFarm = n: entries: assert lib.isAttrs entries; stub n "" // { inherit entries; }; mkShell = a: stub "nix-shell" "" // a;
    # the function form sees its own result, as finalAttrs
    buildGoModule = a: lib.fix (final: stub final.pname "" // (if lib.isFunction a then a final else a));
    callPackage = f: given: let fn = if lib.isFunction f then f else import f; in fn (builtins.intersectAttrs (builtins.functionArgs fn) self // given);
    formats.json = _: let value = types.nullOr (types.oneOf [ types.bool types.int types.str types.path (types.attrsOf value) (types.listOf value) ]) // { description = "JSON value"; descriptionClass = "conjunction"; elem = value; }; in { type = value; generate = n: v: stub n (builtins.toJSON v); };
    stdenv = rec { hostPlatform = { isx86_64 = true; isAarch64 = false; isLinux = true; system = "x86_64-linux"; }; buildPlatform = hostPlatform // { canExecute = p: p.system == "x86_64-linux"; }; };
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
  svc = { name, config, ... }: { imports = [ withDeps ]; options = common // {
    environment = mkOption { type = types.attrsOf (types.nullOr (types.oneOf [ types.str types.path types.package ])); default = { }; };
    path = mkOption { type = types.listOf (types.either types.package types.str); default = [ ]; }; enableDefaultPath = text types.bool true;
    serviceConfig = sect; script = script; preStart = script; postStart = script; preStop = script; postStop = script; reload = script; scriptArgs = text types.str "";
    restartIfChanged = text types.bool true; reloadIfChanged = text types.bool false; stopIfChanged = text types.bool true; notSocketActivated = text types.bool false;
    startAt = any [ ];
  };
    config.path = lib.mkIf config.enableDefaultPath (lib.mkAfter [ pkgs.coreutils pkgs.findutils pkgs.gnugrep pkgs.gnused pkgs.systemd ]);
    config.environment.PATH = lib.mkIf (config.path != [ ]) "${concatStringsSep ":" (map (p: "${p}/bin") config.path)}:${concatStringsSep ":" (map (p: "${p}/sbin") config.path)}";
    config.serviceConfig = lib.mkMerge (map (s: lib.mkIf (s.text != "") { ${s.key} = (if s.name == "start" then lib.id else lib.toList) ("${job "unit-script-${name}-${s.name}" s.text}" + lib.optionalString (s.name == "start") " ${config.scriptArgs}"); }) [
      { key = "ExecStart"; name = "start"; text = config.script; } { key = "ExecStartPre"; name = "pre-start"; text = config.preStart; } { key = "ExecStartPost"; name = "post-start"; text = config.postStart; }
      { key = "ExecStop"; name = "pre-stop"; text = config.preStop; } { key = "ExecStopPost"; name = "post-stop"; text = config.postStop; } { key = "ExecReload"; name = "reload"; text = config.reload; }
    ]);
  };
  other = options: { imports = [ withDeps ]; options = common // options; };
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
  withDeps = { config, ... }: { config.unitConfig = deps config; };
  install = c: lib.optionalString (c.wantedBy != [ ]) "\n[Install]\nWantedBy=${concatStringsSep " " c.wantedBy}\n";
  job = n: t: pkgs.writeShellScript n t;
  service = n: c: "[Unit]\n${section c.unitConfig}\n[Service]\n"
    + concatStringsSep "" (mapAttrsToList (k: v: lib.optionalString (v != null) "Environment=${builtins.toJSON "${k}=${toString v}"}\n") c.environment)
    + lib.optionalString c.reloadIfChanged "X-ReloadIfChanged=true\n" + lib.optionalString (!c.reloadIfChanged && !c.restartIfChanged) "X-RestartIfChanged=false\n"
    + lib.optionalString (!c.stopIfChanged) "X-StopIfChanged=false\n" + lib.optionalString c.notSocketActivated "X-NotSocketActivated=true\n"
    + section c.serviceConfig
    + lib.optionalString (c.startAt != [ ]) (throw "systemd.services.${n}.startAt: mini has no timers for it")
    + install c;
  socket = _: c: "[Unit]\n${section c.unitConfig}\n[Socket]\n${section c.socketConfig}"
    + concatStringsSep "" (map (s: "ListenStream=${s}\n") c.listenStreams) + concatStringsSep "" (map (s: "ListenDatagram=${s}\n") c.listenDatagrams) + install c;
  target = _: c: "[Unit]\n${section c.unitConfig}";
  plain = name: key: _: c: "[Unit]\n${section c.unitConfig}\n[${name}]\n${section c.${key}}" + install c;
  base = { config, ... }: {
    options = {
      assertions = mkOption { type = types.listOf types.unspecified; default = [ ]; }; warnings = strs; lib = any { }; meta = any { };
      environment = { systemPackages = mkOption { type = types.listOf types.package; default = [ ]; }; etc = mkOption { default = { }; type = types.attrsOf (types.submodule { options = { enable = text types.bool true; text = text (types.nullOr types.lines) null; source = text (types.nullOr types.path) null; mode = text types.str "symlink"; target = text types.str ""; user = text types.str "+0"; group = text types.str "+0"; }; }); }; };
      boot = { kernelModules = strs; kernelParams = strs; initrd = { availableKernelModules = strs; kernelModules = strs; systemd = { enable = text types.bool true; services = of svc; storePaths = mkOption { type = types.listOf types.unspecified; default = [ ]; }; contents = any { }; }; }; };
      users.users = mkOption { default = { }; type = types.attrsOf (types.submodule { options = { isSystemUser = text types.bool false; isNormalUser = text types.bool false; group = text types.str ""; extraGroups = strs; uid = text (types.nullOr types.int) null; home = text types.str "/var/empty"; description = text types.str ""; }; }); };
      users.groups = mkOption { default = { }; type = types.attrsOf (types.submodule { options = { gid = text (types.nullOr types.int) null; members = strs; }; }); };
      networking.hostName = text types.str "nixos";
      security = any { };
      services.udev.extraRules = text types.lines "";
      system.checks = mkOption { type = types.listOf types.package; default = [ ]; };
      systemd = {
        services = of svc; sockets = of (other { socketConfig = sect; listenStreams = strs; listenDatagrams = strs; }); timers = of (other { timerConfig = sect; }); paths = of (other { pathConfig = sect; }); targets = of (other { }); slices = of (other { sliceConfig = sect; });
        packages = mkOption { type = types.listOf types.package; default = [ ]; };
        # what NixOS has of late; a test of an older one says so
        package = mkOption { type = types.package; default = pkgs.systemd // { version = "260.1"; }; };
        tmpfiles.rules = strs; tmpfiles.settings = any { };
        unitText = mkOption { type = types.attrsOf types.str; default = { }; }; units = any { };
      };
    };
    config.systemd.unitText = lib.mapAttrs (_: u: u.text) config.systemd.units;
    # every unit that the modules say something of: its text, and where NixOS links it
    config.systemd.units = lib.foldl' (all: kind: all // lib.mapAttrs' (n: c: lib.nameValuePair "${n}.${kind.suffix}" {
      inherit (c) enable aliases wantedBy requiredBy upheldBy overrideStrategy; text = kind.text n c;
    }) kind.units) { } [
      { suffix = "service"; units = config.systemd.services; text = service; }
      { suffix = "socket"; units = config.systemd.sockets; text = socket; }
      { suffix = "target"; units = config.systemd.targets; text = target; }
      { suffix = "path"; units = config.systemd.paths; text = plain "Path" "pathConfig"; }
      { suffix = "timer"; units = config.systemd.timers; text = plain "Timer" "timerConfig"; }
      { suffix = "slice"; units = config.systemd.slices; text = plain "Slice" "sliceConfig"; }
    ];
  };
  r = lib.evalModules { modules = [ base ] ++ modules; specialArgs = { inherit pkgs; modulesPath = "/nixpkgs/nixos/modules"; }; };
  failed = map (a: a.message) (lib.filter (a: !a.assertion) r.config.assertions);
in r // { inherit pkgs lib failed; ok = if failed == [ ] then true else builtins.throw "Failed assertions:\n${concatStringsSep "\n" (map (m: "- ${m}") failed)}"; }
