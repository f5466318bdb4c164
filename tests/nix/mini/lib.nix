# A small module system of our own, with the names and the behaviour that a NixOS module needs of `lib`, so that a module can
# be evaluated where nixpkgs cannot be had. Only what is listed here exists: a module that uses more fails to evaluate.
let
  b = builtins;
  inherit (b) attrNames attrValues concatLists concatMap concatStringsSep elem elemAt filter foldl' genList hasAttr head
    isAttrs isBool isFunction isInt isList isPath isString length listToAttrs map mapAttrs match removeAttrs sort stringLength
    substring tail toString;
  inherit (b) throw toJSON seq all any;
  showLoc = concatStringsSep ".";
  id = x: x;

  # ---- plain helpers
  nameValuePair = name: value: { inherit name value; };
  mapAttrs' = f: s: listToAttrs (map (n: f n s.${n}) (attrNames s));
  mapAttrsToList = f: s: map (n: f n s.${n}) (attrNames s);
  genAttrs = names: f: listToAttrs (map (n: nameValuePair n (f n)) names);
  filterAttrs = p: s: removeAttrs s (filter (n: !(p n s.${n})) (attrNames s));
  optional = c: x: if c then [ x ] else [ ];
  optionals = c: xs: if c then xs else [ ];
  optionalAttrs = c: s: if c then s else { };
  optionalString = c: s: if c then s else "";
  concatMapStringsSep = sep: f: xs: concatStringsSep sep (map f xs);
  hasPrefix = p: s: substring 0 (stringLength p) s == p;
  hasSuffix = p: s: stringLength s >= stringLength p && substring (stringLength s - stringLength p) (stringLength p) s == p;
  removeSuffix = p: s: if hasSuffix p s then substring 0 (stringLength s - stringLength p) s else s;
  removePrefix = p: s: if hasPrefix p s then substring (stringLength p) (stringLength s) s else s;
  unique = foldl' (acc: x: if elem x acc then acc else acc ++ [ x ]) [ ];
  toList = x: if isList x then x else [ x ];
  flatten = x: if isList x then concatMap flatten x else [ x ];
  recursiveUpdate = a: c: a // mapAttrs (n: v: if isAttrs v && isAttrs (a.${n} or null) then recursiveUpdate a.${n} v else v) c;
  escapeShellArg = s: "'" + b.replaceStrings [ "'" ] [ "'\\''" ] (toString s) + "'";
  escapeShellArgs = concatMapStringsSep " " escapeShellArg;
  getExe = p: "${p}/bin/${p.meta.mainProgram or (throw "lib.getExe: ${p.name or "?"} has no meta.mainProgram")}";
  getExe' = p: n: "${p}/bin/${n}";
  makeBinPath = ps: concatMapStringsSep ":" (p: "${p}/bin") ps;
  fix = f: let x = f x; in x;

  # ---- values with a condition, a priority or several parts
  tagged = t: v: isAttrs v && (v._type or "") == t;
  mkIf = condition: content: { _type = "if"; inherit condition content; };
  mkMerge = contents: { _type = "merge"; inherit contents; };
  mkOverride = priority: content: { _type = "override"; inherit priority content; };
  mkDefault = mkOverride 1000;
  mkForce = mkOverride 50;
  mkOptionDefault = mkOverride 1500;
  mkOrder = order: content: { _type = "order"; inherit order content; };
  mkBefore = mkOrder 500;
  mkAfter = mkOrder 1500;

  # a set definition → the list of plain sets it stands for, its tags pushed down to the attributes
  pushDown = v:
    if tagged "merge" v then concatMap pushDown v.contents
    else if tagged "if" v then map (mapAttrs (_: mkIf v.condition)) (pushDown v.content)
    else if tagged "override" v then map (mapAttrs (_: mkOverride v.priority)) (pushDown v.content)
    else [ v ];
  # a leaf definition → [ { prio, order, value } ]
  discharge = prio: order: v:
    if tagged "merge" v then concatMap (discharge prio order) v.contents
    else if tagged "if" v then (if v.condition then discharge prio order v.content else [ ])
    else if tagged "override" v then discharge v.priority order v.content
    else if tagged "order" v then discharge prio v.order v.content
    else [ { inherit prio order; value = v; } ];
  mergeDefs = loc: type: defs:
    let
      flat = concatMap (d: map (x: x // { inherit (d) file; }) (discharge 100 1000 d.value)) defs;
      top = foldl' (p: d: if d.prio < p then d.prio else p) 9999 flat;
      won = sort (x: y: x.order < y.order) (filter (d: d.prio == top) flat);
      bad = filter (d: !type.check d.value) won;
    in
    if bad != [ ] then throw "A definition for option `${showLoc loc}' is not of type `${type.description}' (in ${(head bad).file})"
    else { used = won; value = type.merge loc won; };

  # ---- option declarations and types
  mkOption = o:
    let odd = filter (n: !elem n [ "type" "default" "defaultText" "example" "description" "apply" "readOnly" "internal" "visible" "relatedPackages" ]) (attrNames o); in
    if odd != [ ] then throw "lib.mkOption: no such attribute: ${concatStringsSep ", " odd}" else { _type = "option"; } // o;
  mkEnableOption = d: mkOption { type = types.bool; default = false; description = "Whether to enable ${d}."; };
  mkPackageOption = pkgs: name: a: mkOption { type = types.package; default = pkgs.${name}; description = "The ${name} package to use."; };
  literalExpression = text: { _type = "literalExpression"; inherit text; };

  mergeEqual = loc: defs:
    if all (d: d.value == (head defs).value) defs then (head defs).value
    else throw "The option `${showLoc loc}' has conflicting definition values (in ${concatMapStringsSep ", " (d: d.file) defs})";
  simple = description: check: { inherit description check; merge = mergeEqual; };
  elems = loc: type: defs: # attribute by attribute
    let sets = concatMap (d: map (value: { inherit (d) file; inherit value; }) (pushDown d.value)) defs;
      names = unique (concatMap (d: attrNames d.value) sets);
      of = n: mergeDefs (loc ++ [ n ]) type (concatMap (d: optional (hasAttr n d.value) { inherit (d) file; value = d.value.${n}; }) sets);
      all' = genAttrs names of;
    in mapAttrs (_: x: x.value) (filterAttrs (_: x: x.used != [ ]) all');
  isDrv = x: isAttrs x && (x.type or "") == "derivation";
  types = rec {
    bool = simple "boolean" isBool;
    int = simple "signed integer" isInt;
    str = simple "string" isString;
    path = simple "absolute path" (x: isDrv x || isPath x || (isString x && hasPrefix "/" x));
    package = simple "package" (x: isDrv x || isPath x);
    lines = { description = "strings concatenated with \"\\n\""; check = isString; merge = _: defs: concatMapStringsSep "\n" (d: d.value) defs; };
    port = ints.between 0 65535;
    ints = {
      between = lo: hi: simple "integer between ${toString lo} and ${toString hi}" (x: isInt x && x >= lo && x <= hi);
      unsigned = simple "unsigned integer" (x: isInt x && x >= 0);
      positive = simple "positive integer" (x: isInt x && x > 0);
    };
    strMatching = re: simple "string matching the pattern ${re}" (x: isString x && match re x != null);
    singleLineStr = strMatching "[^\n]*";
    nonEmptyStr = strMatching "(.|\n)+";
    enum = vs: simple "one of ${toJSON vs}" (x: elem x vs);
    nullOr = t: t // { description = "null or ${t.description}"; check = x: x == null || t.check x;
      merge = loc: defs: if all (d: d.value == null) defs then null else t.merge loc defs; };
    either = x: y: { description = "${x.description} or ${y.description}"; check = v: x.check v || y.check v;
      merge = loc: defs: if all (d: x.check d.value) defs then x.merge loc defs else y.merge loc defs; };
    oneOf = ts: foldl' either (head ts) (tail ts);
    listOf = t: { description = "list of ${t.description}"; check = isList;
      merge = loc: defs: concatLists (map (d: concatLists (b.genList (i: let r = mergeDefs (loc ++ [ (toString i) ]) t [ { inherit (d) file; value = elemAt d.value i; } ]; in optional (r.used != [ ]) r.value) (length d.value))) defs); };
    attrsOf = t: { description = "attribute set of ${t.description}"; check = isAttrs; merge = loc: defs: elems loc t defs; };
    lazyAttrsOf = attrsOf;
    anything = { description = "anything"; check = _: true;
      merge = loc: defs: if all (d: isAttrs d.value && !isDrv d.value) defs then elems loc anything defs else mergeEqual loc defs; };
    unspecified = anything; raw = simple "raw value" (_: true); attrs = anything;
    submodule = m: submoduleWith { modules = toList m; };
    submoduleWith = { modules, specialArgs ? { } }: { description = "submodule"; check = x: isAttrs x || isFunction x;
      merge = loc: defs: (eval { prefix = loc; inherit specialArgs; modules = modules ++ [ { _module.args.name = elemAt loc (length loc - 1); } ] ++ map (d: { _file = d.file; imports = [ (if isFunction d.value then d.value else { config = d.value; }) ]; }) defs; }).config; };
    deferredModule = raw;
    # a systemd unit's setting: lists from several places are joined, anything else must agree
    unitOption = { description = "systemd option"; check = _: true;
      merge = loc: defs: if any (d: isList d.value) defs then concatMap (d: toList d.value) defs else mergeEqual loc defs; };
  };

  # ---- modules
  isOpt = tagged "option";
  eval = { modules, specialArgs ? { }, prefix ? [ ] }:
    let
      args = specialArgs // { inherit lib config options; } // (config'._module.args or { });
      # _module.args is read from the modules' plain `_module.args` settings alone
      config' = { _module.args = foldl' (a: m: a // (m.raw._module.args or { })) { } loaded; };
      load = from: m:
        let
          file = if isPath m || (isString m) then toString m else (if isAttrs m then m._file or from else from);
          v = if isPath m || isString m then import m else m;
          val = if isFunction v then v (let want = b.functionArgs v; in if want == { } then args else mapAttrs (n: _: args.${n} or (throw "module ${file}: no argument `${n}'")) (removeAttrs want (filter (n: want.${n} && !hasAttr n args) (attrNames want)))) else v;
          short = !(val ? config || val ? options);
          raw = if short then { config = removeAttrs val [ "imports" "_file" "key" "_module" "_class" "meta" "freeformType" ]; _module = val._module or { }; } // optionalAttrs (val ? freeformType) { inherit (val) freeformType; } else val;
        in
        [ { inherit file raw; } ] ++ concatMap (load file) (val.imports or [ ]);
      loaded = concatMap (load "<module>") modules;
      decls = concatMap (m: optional (m.raw ? options) { inherit (m) file; value = m.raw.options; }) loaded;
      defs = concatMap (m: map (value: { inherit (m) file; inherit value; }) (pushDown (m.raw.config or { }))) loaded;
      freeform = let f = filter (m: (m.raw._module or { }) ? freeformType || (m.raw ? freeformType)) loaded; in if f == [ ] then null else (head f).raw.freeformType or (head f).raw._module.freeformType;
      tree = loc: ds: dfs:
        let
          declared = unique (concatMap (d: attrNames d.value) ds);
          defined = unique (concatMap (d: attrNames d.value) dfs);
          unknown = filter (n: !elem n declared && n != "_module") defined;
          sub = n: xs: concatMap (d: optional (hasAttr n d.value) { inherit (d) file; value = d.value.${n}; }) xs;
          one = n:
            let here = loc ++ [ n ]; decl = sub n ds; opts = filter (d: isOpt d.value) decl; o = foldl' (a: d: a // d.value) { } opts;
              type = o.type or types.anything;
              set = mergeDefs here type (sub n dfs);
              # the default is only looked at where nothing else is set: it may be a `throw`
              r = if set.used == [ ] && o ? default then mergeDefs here type [ { file = "the option's default"; value = o.default; } ] else set;
            in
            if opts != [ ] then (o.apply or id) (
              if o.readOnly or false && sub n dfs != [ ] then throw "The option `${showLoc here}' is read-only, but it is set."
              else if r.used == [ ] then throw "The option `${showLoc here}' was accessed but has no value defined. Try setting the option."
              else r.value)
            else tree here decl (concatMap (d: map (value: { inherit (d) file; inherit value; }) (pushDown d.value)) (sub n dfs));
          extra = elems loc (freeform.elem or types.anything) (map (d: d // { value = filterAttrs (n: _: elem n unknown) d.value; }) dfs);
        in
        if unknown != [ ] && (freeform == null || loc != prefix) then throw "The option `${showLoc (loc ++ [ (head unknown) ])}' does not exist (defined in ${(head (sub (head unknown) dfs)).file})"
        else genAttrs declared one // optionalAttrs (unknown != [ ]) extra;
      options = foldl' (a: d: recursiveUpdate a d.value) { } decls;
      config = tree prefix decls defs;
    in { inherit config options; };

  lib = {
    inherit id nameValuePair mapAttrs' mapAttrsToList genAttrs filterAttrs optional optionals optionalAttrs optionalString
      concatMapStringsSep hasPrefix hasSuffix removeSuffix removePrefix unique toList flatten recursiveUpdate escapeShellArg escapeShellArgs
      getExe getExe' makeBinPath fix mkIf mkMerge mkOverride mkDefault mkForce mkOptionDefault mkOrder mkBefore mkAfter
      mkOption mkEnableOption mkPackageOption literalExpression types;
    inherit (b) attrNames attrValues concatLists concatMap concatStringsSep elem elemAt filter foldl' genList hasAttr head isAttrs
      isBool isFunction isInt isList isString length listToAttrs map mapAttrs match removeAttrs sort stringLength substring tail all any throw;
    inherit (b) replaceStrings toJSON;
    literalMD = literalExpression; mdDoc = id;
    isDerivation = isDrv;
    assertMsg = c: m: if c then true else throw m;
    warn = m: v: b.trace "warning: ${m}" v;
    evalModules = { modules, specialArgs ? { }, prefix ? [ ], class ? null }: eval { inherit modules specialArgs prefix; };
    maintainers = { }; licenses.asl20.spdxId = "Apache-2.0"; platforms.linux = [ "x86_64-linux" "aarch64-linux" ];
    # a file set is the list of its paths, each of which must be there
    fileset = {
      unions = map (p: if isPath p && b.pathExists p then p else throw "lib.fileset.unions: ${toString p} does not exist");
      toSource = { root, fileset }: { inherit root fileset; };
    };
  };
in lib
