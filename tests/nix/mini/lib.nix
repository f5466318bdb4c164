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
  count = p: xs: length (filter p xs);
  concatMapStrings = concatMapStringsSep "";
  mod = x: y: x - y * (x / y);
  max = x: y: if x > y then x else y;
  hasPrefix = p: s: substring 0 (stringLength p) s == p;
  hasSuffix = p: s: stringLength s >= stringLength p && substring (stringLength s - stringLength p) (stringLength p) s == p;
  hasInfix = p: s: length (b.split (b.replaceStrings [ "\\" "." "*" "+" "?" "(" ")" "[" "]" "{" "}" "^" "$" "|" ] [ "\\\\" "\\." "\\*" "\\+" "\\?" "\\(" "\\)" "\\[" "]" "\\{" "}" "\\^" "\\$" "\\|" ] p) s) > 1;
  removeSuffix = p: s: if hasSuffix p s then substring 0 (stringLength s - stringLength p) s else s;
  removePrefix = p: s: if hasPrefix p s then substring (stringLength p) (stringLength s) s else s;
  unique = foldl' (acc: x: if elem x acc then acc else acc ++ [ x ]) [ ];
  reverse = xs: b.genList (i: elemAt xs (length xs - 1 - i)) (length xs);
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
    # what is in it is not looked at
    else if tagged "order" v then [ { inherit prio; inherit (v) order; value = v.content; } ]
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
  mkEnableOption = d: mkOption { type = types.bool; default = false; example = true; description = "Whether to enable ${d}."; };
  mkPackageOption = pkgs: name: a: mkOption { type = types.package; default = pkgs.${name}; description = "The ${name} package to use."; };
  literalExpression = text: { _type = "literalExpression"; inherit text; };

  mergeEqual = loc: defs:
    if length defs == 1 || all (d: d.value == (head defs).value) defs then (head defs).value
    else throw "The option `${showLoc loc}' has conflicting definition values (in ${concatMapStringsSep ", " (d: d.file) defs})";
  # what a type inside another is called: in parentheses where it would be misread
  phrase = classes: t: if elem (t.descriptionClass or null) classes then t.description else "(${t.description})";
  # a type's options, as documentation shows them: those of submodules alone
  subOptions = t: loc: if t ? getSubOptions then t.getSubOptions loc else { };
  simple = description: check: { inherit description check; merge = mergeEqual; descriptionClass = "noun"; };
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
    path = simple "absolute path" (x: isDrv x || isPath x || (isString x && hasPrefix "/" x) || (isAttrs x && x ? outPath && hasPrefix "/" (toString x)));
    package = simple "package" (x: isDrv x || isPath x);
    lines = { description = "strings concatenated with \"\\n\""; check = isString; merge = _: defs: concatMapStringsSep "\n" (d: d.value) defs; };
    port = ints.between 0 65535 // { description = "16 bit unsigned integer; between 0 and 65535 (both inclusive)"; };
    ints = {
      between = lo: hi: simple "integer between ${toString lo} and ${toString hi} (both inclusive)" (x: isInt x && x >= lo && x <= hi);
      unsigned = simple "unsigned integer, meaning >=0" (x: isInt x && x >= 0) // { descriptionClass = "nonRestrictiveClause"; };
      positive = simple "positive integer, meaning >0" (x: isInt x && x > 0) // { descriptionClass = "nonRestrictiveClause"; };
    };
    strMatching = re: simple "string matching the pattern ${re}" (x: isString x && match re x != null);
    singleLineStr = strMatching "[^\n]*";
    nonEmptyStr = strMatching "(.|\n)+";
    enum = vs: simple "one of ${concatMapStringsSep ", " toJSON vs}" (x: elem x vs) // { descriptionClass = "conjunction"; };
    nullOr = t: t // { description = "null or ${phrase [ "noun" "conjunction" ] t}"; descriptionClass = "conjunction"; check = x: x == null || t.check x; empty = null; of = t; with' = nullOr;
      merge = loc: defs: if all (d: d.value == null) defs then null else t.merge loc defs; };
    either = x: y: { description = "${phrase [ "noun" "conjunction" ] x} or ${phrase [ "noun" "conjunction" ] y}"; descriptionClass = "conjunction"; check = v: x.check v || y.check v;
      merge = loc: defs: if all (d: x.check d.value) defs then x.merge loc defs else y.merge loc defs; };
    oneOf = ts: foldl' either (head ts) (tail ts);
    listOf = t: { description = "list of ${phrase [ "noun" "composite" ] t}"; descriptionClass = "composite"; getSubOptions = loc: subOptions t (loc ++ [ "*" ]); check = isList; empty = [ ];
      merge = loc: defs: concatLists (map (d: concatLists (b.genList (i: let r = mergeDefs (loc ++ [ (toString i) ]) t [ { inherit (d) file; value = elemAt d.value i; } ]; in optional (r.used != [ ]) r.value) (length d.value))) defs); };
    attrsOf = t: { description = "attribute set of ${phrase [ "noun" "composite" ] t}"; descriptionClass = "composite"; getSubOptions = loc: subOptions t (loc ++ [ "<name>" ]); check = isAttrs; empty = { }; of = t; with' = attrsOf; merge = loc: defs: elems loc t defs; };
    lazyAttrsOf = attrsOf;
    anything = { description = "anything"; descriptionClass = "noun"; check = _: true;
      merge = loc: defs: if all (d: isAttrs d.value && !isDrv d.value) defs then elems loc anything defs else mergeEqual loc defs; };
    # what one module alone sets is not looked into
    unspecified = anything // { merge = loc: defs: if length defs == 1 then (head defs).value else anything.merge loc defs; };
    raw = simple "raw value" (_: true); attrs = anything;
    submodule = m: submoduleWith { modules = toList m; };
    submoduleWith = { modules, specialArgs ? { } }: let docs = loc: eval { prefix = loc; inherit specialArgs; modules = modules ++ [ { _module.args.name = "‹name›"; } ]; }; in {
      description = let f = (docs [ ]).freeform; in if f == null then "submodule" else "open submodule of ${phrase [ "noun" "composite" ] f}";
      getSubOptions = loc: (docs loc).options; check = x: isAttrs x || isFunction x; inherit modules specialArgs;
      merge = loc: defs: (eval { prefix = loc; inherit specialArgs; modules = modules ++ [ { _module.args.name = elemAt loc (length loc - 1); } ] ++ map (d: { _file = d.file; } // (if isFunction d.value || isPath d.value then { imports = [ d.value ]; } else { config = d.value; })) defs; }).config; };
    deferredModule = raw;
    # a systemd unit's setting: lists from several places are joined, anything else must agree
    unitOption = { description = "systemd option"; check = _: true;
      merge = loc: defs: if any (d: isList d.value) defs then concatMap (d: toList d.value) defs else mergeEqual loc defs; };
  };

  # an option that several modules declare has the options of all their submodules; otherwise their types agree
  bothTypes = loc: x: y:
    if x ? modules && y ? modules then types.submoduleWith { modules = x.modules ++ y.modules; specialArgs = x.specialArgs // y.specialArgs; }
    else if x ? of && y ? of && !(x ? modules || y ? modules) then x.with' (bothTypes loc x.of y.of)
    else if !(x ? of || y ? of || x ? modules || y ? modules) && x.description == y.description then x
    else throw "The option `${showLoc loc}' is already declared, with another type";
  bothDeclarations = loc: x: y:
    let twice = filter (n: hasAttr n x && hasAttr n y) [ "default" "description" "example" "apply" ]; in
    if twice != [ ] then throw "The option `${showLoc loc}' is already declared"
    else y // x // optionalAttrs (x ? type && y ? type) { type = bothTypes loc x.type y.type; };

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
        { inherit file raw; key = val.key or (if isPath m || isString m then file else null); imports = map (load file) (val.imports or [ ]); };
      # level by level, as builtins.genericClosure goes
      closure = ms: if ms == [ ] then [ ] else ms ++ closure (concatMap (m: m.imports) ms);
      # a file that is imported twice, and what has one key, is one module; the last module's definitions come first
      loaded = reverse (foldl' (all: m: if m.key != null && any (n: n.key == m.key) all then all else all ++ [ m ]) [ ] (closure (map (load "<module>") modules)));
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
            let here = loc ++ [ n ]; decl = sub n ds; opts = filter (d: isOpt d.value) decl; o = foldl' (a: d: bothDeclarations here a d.value) { } opts;
              type = o.type or types.anything;
              set = mergeDefs here type (sub n dfs);
              # the default is only looked at where nothing else is set: it may be a `throw`
              r = if set.used == [ ] && o ? default then mergeDefs here type [ { file = "the option's default"; value = o.default; } ] else set;
            in
            if opts != [ ] then (o.apply or id) (
              if o.readOnly or false && sub n dfs != [ ] then throw "The option `${showLoc here}' is read-only, but it is set."
              else if r.used == [ ] && type ? empty then type.empty
              else if r.used == [ ] then throw "The option `${showLoc here}' was accessed but has no value defined. Try setting the option."
              else r.value)
            else tree here decl (concatMap (d: map (value: { inherit (d) file; inherit value; }) (pushDown d.value)) (sub n dfs));
          extra = elems loc (freeform.elem or types.anything) (map (d: d // { value = filterAttrs (n: _: elem n unknown) d.value; }) dfs);
        in
        if unknown != [ ] && (freeform == null || loc != prefix) then throw "The option `${showLoc (loc ++ [ (head unknown) ])}' does not exist (defined in ${(head (sub (head unknown) dfs)).file})"
        else genAttrs declared one // optionalAttrs (unknown != [ ]) extra;
      bothOptions = x: y: x // mapAttrs (n: v: if !(hasAttr n x) then v else if isOpt v then bothDeclarations [ n ] x.${n} v else bothOptions x.${n} v) y;
      located = loc: mapAttrs (n: v: if isOpt v then v // { loc = loc ++ [ n ]; } else if isAttrs v then located (loc ++ [ n ]) v else v);
      options = located prefix (foldl' bothOptions { } (map (d: d.value) decls));
      config = tree prefix decls defs;
    in { inherit config options freeform; };

  lib = {
    inherit id nameValuePair mapAttrs' mapAttrsToList genAttrs filterAttrs optional optionals optionalAttrs optionalString
      count concatMapStrings concatMapStringsSep mod max hasInfix hasPrefix hasSuffix removeSuffix removePrefix unique toList flatten recursiveUpdate escapeShellArg escapeShellArgs
      getExe getExe' makeBinPath fix mkIf mkMerge mkOverride mkDefault mkForce mkOptionDefault mkOrder mkBefore mkAfter
      mkOption mkEnableOption mkPackageOption literalExpression types;
    inherit (b) attrNames attrValues concatLists concatMap concatStringsSep elem elemAt filter foldl' genList hasAttr head isAttrs
      isBool isFunction isInt isList isString length listToAttrs map mapAttrs match removeAttrs sort stringLength substring tail all any throw;
    inherit (b) replaceStrings toJSON;
    versionAtLeast = v: least: b.compareVersions v least >= 0;
    literalMD = text: { _type = "literalMD"; inherit text; }; mdDoc = id;
    isDerivation = isDrv;
    assertMsg = c: m: if c then true else throw m;
    warn = m: v: b.trace "warning: ${m}" v;
    evalModules = { modules, specialArgs ? { }, prefix ? [ ], class ? null }: eval { inherit modules specialArgs prefix; };
    maintainers = { }; licenses.asl20.spdxId = "Apache-2.0"; platforms.linux = [ "x86_64-linux" "aarch64-linux" ];
    # a file set is the list of its files, or a path that must be there
    fileset = let
      list = folder: n: type: if type == "directory" then let d = folder + "/${n}"; in concatLists (mapAttrsToList (list d) (b.readDir d)) else [ (folder + "/${n}") ];
      files = p: if isList p then p
        else if !isPath p || !b.pathExists p then throw "lib.fileset: ${toString p} does not exist"
        else list (b.dirOf p) (baseNameOf p) (b.readDir (b.dirOf p)).${baseNameOf p};
    in {
      unions = sets: unique (concatMap files sets);
      difference = x: y: let without = map toString (files y); in filter (f: !elem (toString f) without) (files x);
      fileFilter = p: path: filter (f: let name = baseNameOf f; in p { inherit name; type = "regular"; hasExt = e: hasSuffix ".${e}" name; }) (files path);
      toSource = { root, fileset }: { inherit root; fileset = files fileset; };
    };
  };
in lib
