# services.guestagent.vms: the credentials of this host's VMs, and how the VMs are. With microvm.nix or without.
{
  config,
  options,
  lib,
  pkgs,
  ...
}:

let
  cfg = config.services.guestagent;
  inherit (lib) types;

  guestctl = lib.getExe cfg.hostPackage;

  # microvm.nix is the user's: there is none, it is off, or it runs the VMs in microvm.vms.
  hasMicrovm = options.microvm ? host && config.microvm.host.enable;
  microvms = lib.optionalAttrs hasMicrovm config.microvm.vms;
  hasSops = options ? sops.secrets;

  # A VM's guest is evaluated here (config), or came evaluated (flake, evaluatedConfig): that can be read, not changed.
  isGiven = vm: vm.flake != null || vm.evaluatedConfig != null;
  guestOf =
    name:
    let
      vm = microvms.${name};
    in
    if !(microvms ? ${name}) then
      null
    else if vm.flake != null then
      vm.flake.nixosConfigurations.${name}.config
    else if vm.evaluatedConfig != null then
      vm.evaluatedConfig.config
    else if vm.config != null then
      vm.config.config
    else
      null;

  # Where the VMM shows vsock as a Unix socket, in the VM's folder.
  hasSocket =
    hypervisor:
    lib.elem hypervisor [
      "cloud-hypervisor"
      "firecracker"
    ];

  credential =
    { name, ... }:
    {
      options = {
        source = lib.mkOption {
          type = types.nullOr types.str;
          default = null;
          example = "/var/lib/secrets/web-db-password";
          description = ''
            The file with the value: an absolute path on this host, outside of the Nix store. When the file changes, the
            VM's provider takes the new value, and the VM is not touched. It may be the path of a secret of sops-nix, of
            agenix or of clan.
          '';
        };
        sops = lib.mkOption {
          type = types.nullOr types.str;
          default = null;
          example = "web/db-password";
          description = ''
            The name of a secret of sops-nix on this host, in place of `source`. When it changes, sops-nix restarts the
            VM's provider.
          '';
        };
        destination = lib.mkOption {
          type = types.str;
          default = name;
          defaultText = lib.literalMD "the attribute's name";
          description = "The credential's name in the guest.";
        };
        required = lib.mkOption {
          type = types.bool;
          default = true;
          description = ''
            Whether the provider needs the file: while it is missing the provider does not start, and is tried again every
            five seconds. What is not required is handed over once it is there, and taken away in the guest when it is
            gone.
          '';
        };
      };
    };

  vm =
    { name, config, ... }:
    let
      guest = guestOf name;
    in
    {
      options = {
        hypervisor = lib.mkOption {
          type = types.nullOr (
            types.enum [
              "alioth"
              "cloud-hypervisor"
              "crosvm"
              "firecracker"
              "kvmtool"
              "qemu"
              "stratovirt"
            ]
          );
          default = if guest == null then null else guest.microvm.hypervisor;
          defaultText = lib.literalMD "the guest's `microvm.hypervisor` where microvm.nix runs the VM, else `null`";
          description = "The VMM.";
        };
        cid = lib.mkOption {
          type = types.nullOr types.int;
          default =
            if guest == null || config.socket != null || hasSocket config.hypervisor then
              null
            else
              guest.microvm.vsock.cid;
          defaultText = lib.literalMD "the guest's `microvm.vsock.cid` where microvm.nix runs the VM and `socket` is not set";
          description = ''
            The VM's CID, where the VMM has vsock as AF_VSOCK (alioth, crosvm, kvmtool, QEMU); from 3 on, and no other
            VM's. Whoever may open `/dev/vhost-vsock` can take it while the VM is off, and would be given its credentials:
            only root and the group kvm may then.
          '';
        };
        socket = lib.mkOption {
          type = types.nullOr types.str;
          default =
            if guest != null && hasSocket config.hypervisor && guest.microvm.vsock.cid != null then
              "${toString stateDir}/${name}/notify.vsock"
            else
              null;
          defaultText = lib.literalMD "`notify.vsock` in the VM's folder where microvm.nix runs it with cloud-hypervisor or Firecracker and a `microvm.vsock.cid`, else `null`";
          example = "/var/lib/vms/web/vsock.sock";
          description = ''
            Where the VMM shows vsock as a Unix socket (cloud-hypervisor, Firecracker, vhost-device-vsock), in place of
            `cid`. The folder is this VM's alone, and belongs to its VMM's user or to root.
          '';
        };
        unit = lib.mkOption {
          type = types.nullOr (types.strMatching "[a-zA-Z0-9@:_.\\-]+[.]service");
          default = if guest == null then null else "microvm@${name}.service";
          defaultText = lib.literalMD "`\"microvm@NAME.service\"` where microvm.nix runs the VM, else `null`";
          example = "web-vm.service";
          description = ''
            The service that runs the VM. The provider is started with it, restarted with it, and stopped after it. With
            `null` the provider is started with the host. Where the VM runs already when it is first named here, and the
            host does not start it by itself, `systemctl start guestagent-provide@NAME` does so that once.
          '';
        };
        port = lib.mkOption {
          type = types.ints.between 1 4294967294;
          default = guest.services.guestagent.vsock.port or 1022;
          defaultText = lib.literalMD "the guest's `services.guestagent.vsock.port` where microvm.nix runs the VM, else 1022";
          description = "The vsock port of the agent in the guest.";
        };
        providerPort = lib.mkOption {
          type = types.ints.between 768 1021;
          default = if config.cid == null then 1021 else 768 + lib.mod (lib.max 3 config.cid) 254;
          defaultText = lib.literalMD "`768 + (cid mod 254)` where there is a `cid`, else 1021";
          description = ''
            The vsock port of this host that the guest calls. Over AF_VSOCK the VMs share the host's ports, so that each
            needs one of its own.
          '';
        };
        credentialPrefix = lib.mkOption {
          type = types.strMatching "([a-zA-Z0-9][a-zA-Z0-9._-]*)?";
          default = "";
          example = "web.";
          description = ''
            What the credentials' names begin with in the provider's service on this host. The guest does not see it.
          '';
        };
        credentials = lib.mkOption {
          type = types.attrsOf (types.submodule credential);
          default = { };
          example = lib.literalExpression ''
            {
              db-password.source = "/var/lib/secrets/web-db-password";
              api-key.sops = "web/api-key";
            }
          '';
          description = ''
            What the guest is given. It takes these names from nobody else, and what is removed here is taken away there.
          '';
        };
        refresh = lib.mkOption {
          type = types.nullOr (
            types.enum [
              "none"
              "auto"
              "reload"
              "restart"
            ]
          );
          default = null;
          description = ''
            How the guest's units are made to load a value that changes. With `null` the guest's configuration decides,
            by `onChange`.
          '';
        };
        gate = lib.mkOption {
          type = types.nullOr (types.strMatching "[1-9][0-9]{0,3}[smh]");
          default = null;
          example = "30s";
          description = ''
            How long the units that load a new value are watched, from 1s to 1h. If one does not stand it, the values
            before are put in force again. It implies `refresh = "auto"`.
          '';
        };
        boot = {
          strings = lib.mkOption {
            type = types.listOf types.str;
            default = [ ];
            example = [ "io.guestagent.provider:vsock:2:1021" ];
            description = ''
              SMBIOS OEM strings that the VM boots with. They are public: every user of this host can read them. For a VM
              with `microvm.vms.NAME.config`, in QEMU's machine q35 or cloud-hypervisor, on x86-64.
            '';
          };
          credentials = lib.mkOption {
            type = types.bool;
            default = false;
            description = ''
              Whether the VM also boots with the required credentials as OEM strings, for services that start before the
              provider is asked. They may take 56 KiB together. The VMM's user can read them then, and so can the VMMs of
              all other VMs that have that user, as with microvm.nix.
            '';
          };
        };
        exposeOnCommandLine = lib.mkOption {
          type = types.bool;
          default = false;
          description = ''
            Whether `boot.credentials` may put the values on the command line of cloud-hypervisor, which takes them
            nowhere else. Every user of this host can read them there, and they are written into snapshots.
          '';
        };
      };
    };

  inherit (config.microvm) stateDir;

  credentialsOf = vm: lib.attrValues vm.credentials;
  requiredOf = vm: lib.filter (c: c.required) (credentialsOf vm);
  # Those that systemd watches.
  plainOf = vm: lib.filter (c: c.sops == null) (credentialsOf vm);
  sourceOf = c: if c.sops != null then config.sops.secrets.${c.sops}.path else c.source;

  # Specifiers are expanded in both halves of LoadCredential=.
  specifiers = lib.replaceStrings [ "%" ] [ "%%" ];
  loadCredential =
    prefix: c: path:
    "${specifiers "${prefix}${c.destination}"}:${specifiers path}";
  # A path has to be there. A name is looked for in /etc/credstore, and may be missing, or lead to what is.
  storeName = name: c: "guestagent.${name}.${c.destination}";

  registration =
    vm:
    builtins.toJSON {
      target =
        (if vm.cid != null then "vsock:${toString vm.cid}" else "vsock-mux:${toString vm.socket}")
        + lib.optionalString (vm.port != 1022) ":${toString vm.port}";
      provider.port = vm.providerPort;
    };
  providerAddress = vm: "vsock:2:${toString vm.providerPort}";

  # How a VM can be given OEM strings from here, if it can.
  hasBoot = vm: vm.boot.strings != [ ] || vm.boot.credentials;
  bootKind =
    name: vm:
    if !(microvms ? ${name}) || isGiven microvms.${name} || !pkgs.stdenv.hostPlatform.isx86_64 then
      null
    else if vm.hypervisor == "cloud-hypervisor" then
      "cloud-hypervisor"
    else if
      # The machine that is the default there, microvm, has no SMBIOS.
      vm.hypervisor == "qemu"
      && lib.any (machine: lib.hasPrefix machine (guestOf name).microvm.qemu.machine) [
        "pc"
        "q35"
      ]
    then
      "qemu"
    else
      null;
  bootsBy = kind: name: vm: hasBoot vm && bootKind name vm == kind;
  bootCredentials = vm: lib.optionals vm.boot.credentials (requiredOf vm);
  # Tells them from what else the VM's own service loads.
  bootPrefix = "guestagent.";
  # /run/guestagent is root's, so that systemd makes the folder for whom the service runs as.
  bootFolder = name: "guestagent/boot/${name}";
  bootFlags =
    vm:
    lib.concatMapStrings (s: " --string ${lib.escapeShellArg s}") vm.boot.strings
    + lib.optionalString (
      bootCredentials vm != [ ]
    ) " --dir \"$CREDENTIALS_DIRECTORY\" --prefix ${bootPrefix}";
  bootArgs =
    name: vm: "${guestctl} boot-args --vmm qemu --out /run/${bootFolder name}${bootFlags vm}";
  # What guestctl refuses in a string when the VM starts: what a shell would not leave alone, and what has a meaning in
  # --platform.
  unfit = {
    qemu = [
      " "
      "*"
      "?"
      "["
      "\\"
    ];
    cloud-hypervisor = [
      ","
      "\""
      "["
      "]"
    ];
  };
  # cloud-hypervisor as microvm.nix takes it. It adds the strings to the one --platform that there can be.
  execVMM =
    vm: package:
    let
      program = pkgs.writeShellScriptBin "cloud-hypervisor" ''
        exec ${guestctl} exec-vmm${bootFlags vm}${
          lib.optionalString (bootCredentials vm != [ ]) " --on-command-line"
        } -- ${package}/bin/cloud-hypervisor "$@"
      '';
    in
    pkgs.runCommand "guestagent-cloud-hypervisor" { inherit (package) version; } ''
      mkdir -p "$out/bin"
      ln -s ${program}/bin/cloud-hypervisor ${package}/bin/ch-remote "$out/bin/"
    '';

  # What a guest in microvm.vms with `config` gets from here. Its keys do not depend on the guest's configuration: the
  # values do, and are made from that.
  guestModule =
    name:
    let
      vm = cfg.vms.${name};
    in
    {
      _file = "services.guestagent.vms.${name}";
      imports = [ ./module.nix ];
      # Whoever has chosen the package, it is wrapped.
      options.microvm.cloud-hypervisor.package = lib.mkOption {
        apply = package: if bootsBy "cloud-hypervisor" name vm then execVMM vm package else package;
      };
      config = {
        services.guestagent = {
          enable = lib.mkDefault true;
          provider.address = lib.mkDefault (providerAddress vm);
          peer.privilegedPort = lib.mkIf (vm.socket != null) (lib.mkDefault "ignored");
        };
        microvm.extraArgsScript = lib.mkIf (bootsBy "qemu" name vm) (
          lib.mkDefault (bootArgs name vm)
        );
      };
    };

  provider = name: "guestagent-provide@${name}";
  ready = name: "guestagent-ready@${name}";
  sources = name: "guestagent-sources@${name}";

  # A reload brings new credentials from systemd 260 on.
  refreshesOnReload = lib.versionAtLeast config.systemd.package.version "260";

  # systemd takes one overrides.conf, and that of an instance before its template's: what is for all stands in each.
  providerOfAll = {
    overrideStrategy = "asDropin";
    # The shortest time without a provider.
    stopIfChanged = false;
    # An instance whose VM a switch has removed, and its drop-in with it, is not started again.
    unitConfig.ConditionPathExists = [
      "|/etc/guestagent/vms.d/%i.json"
      "|/run/guestagent/vms.d/%i.json"
    ];
  };
  readyOfAll = {
    overrideStrategy = "asDropin";
    # A switch would stop what requires it, and not start that again.
    restartIfChanged = false;
  };

  unitsOf =
    name: vm:
    let
      isMicrovm = microvms ? ${name};
      hasUnit = vm.unit != null;
      hasCredentials = vm.credentials != { };
      plain = plainOf vm;
      # Sources that sops-nix and agenix make, at a switch. They change where a link above the file leads, which systemd does
      # not see unless what it led to is removed.
      madeOf =
        secrets:
        lib.filter (secret: lib.any (c: c.source == secret.path) plain) (lib.attrValues secrets);
      bySops = madeOf (lib.optionalAttrs hasSops config.sops.secrets);
      byAgenix = madeOf (lib.optionalAttrs (options ? age.secrets) config.age.secrets);
      protectHome = lib.mkIf (
        vm.socket != null
        && lib.any (home: lib.hasPrefix home vm.socket) [
          "/home/"
          "/root/"
          "/run/user/"
        ]
      ) false;
    in
    {
      services = {
        ${provider name} = providerOfAll // {
          # A switch starts what an active target wants, and not what a service does, such as that of a VM that runs already.
          wantedBy =
            if hasUnit then
              [ vm.unit ] ++ lib.optional (isMicrovm && microvms.${name}.autostart) "microvms.target"
            else
              [ "multi-user.target" ];
          partOf = lib.optional hasUnit vm.unit;
          # So that it is stopped after it.
          before = lib.optional hasUnit vm.unit;
          # The first makes the VM's folder. The others may not be there; nothing else has sources wait for them.
          after =
            lib.optional isMicrovm "install-microvm-${name}.service"
            ++ lib.optional (bySops != [ ] || plain != credentialsOf vm) "sops-install-secrets.service"
            ++ lib.optional (byAgenix != [ ]) "agenix-install-secrets.service"
            # A reload waits until that has ended, when systemd watches again: a second change meanwhile would be lost.
            ++ lib.optional (plain != [ ]) "${sources name}.service";
          restartTriggers = [
            (registration vm)
          ]
          ++ map (secret: secret.sopsFileHash) bySops
          ++ map (secret: secret.file) byAgenix;
          environment.PROVIDE_OPTIONS = lib.concatStringsSep " " (
            [ "--report-group guestagent" ]
            ++ lib.optional (hasCredentials && vm.credentialPrefix != "") "--prefix ${vm.credentialPrefix}"
            # systemd makes no folder where there are no credentials.
            ++ lib.optional (!hasCredentials) "--dir /run/guestagent/empty"
            ++ lib.optional (vm.refresh != null) "--refresh ${vm.refresh}"
            ++ lib.optional (vm.gate != null) "--gate ${vm.gate}"
          );
          serviceConfig = {
            LoadCredential = map (
              c: loadCredential vm.credentialPrefix c (if c.required then sourceOf c else storeName name c)
            ) (credentialsOf vm);
            ProtectHome = protectHome;
            ReadWritePaths = lib.mkIf (vm.socket != null) [ (builtins.dirOf vm.socket) ];
            RefreshOnReload = lib.mkIf refreshesOnReload "credentials";
            RuntimeDirectory = lib.mkIf (!hasCredentials) [ "guestagent/empty" ];
          };
        };

        ${ready name} = readyOfAll // {
          partOf = lib.optional hasUnit vm.unit;
          after = lib.optional hasUnit vm.unit;
          serviceConfig.ProtectHome = protectHome;
        };
      }
      // lib.optionalAttrs (plain != [ ]) {
        ${sources name} = {
          description = "Have the VM ${name} Provided With Changed Credentials";
          startLimitIntervalSec = 0;
          serviceConfig = {
            Type = "oneshot";
            # While this runs, systemd does not watch.
            ExecStart = "${config.systemd.package}/bin/systemctl --no-block ${
              if refreshesOnReload then "try-reload-or-restart" else "try-restart"
            } ${provider name}.service";
          };
        };
      }
      // lib.optionalAttrs (hasBoot vm) {
        "microvm@${name}".serviceConfig = {
          LoadCredential = map (c: loadCredential bootPrefix c (sourceOf c)) (bootCredentials vm);
          RuntimeDirectory = lib.mkIf (bootsBy "qemu" name vm) [ (bootFolder name) ];
          RuntimeDirectoryMode = lib.mkIf (bootsBy "qemu" name vm) "0700";
        };
      };

      paths = lib.optionalAttrs (plain != [ ]) {
        ${sources name} = {
          description = "Watch the Credentials of the VM ${name}";
          wantedBy = [ "paths.target" ];
          # By default it would come before paths.target, and so before the network, and it comes after the file systems
          # that the sources are on, which may come after the network.
          unitConfig.DefaultDependencies = false;
          requires = [ "sysinit.target" ];
          after = [ "sysinit.target" ];
          conflicts = [ "shutdown.target" ];
          before = [ "shutdown.target" ];
          pathConfig.PathChanged = lib.unique (map (c: specifiers c.source) plain);
        };
      };
    };

  # All that have AF_VSOCK here, in services.guestagent.vms or not: with a CID that is another's, too, a VM would be given
  # the other's credentials.
  cids =
    lib.mapAttrsToList (name: vm: {
      inherit name;
      inherit (vm) cid;
    }) cfg.vms
    ++ lib.mapAttrsToList (
      name: _:
      let
        microvm = (guestOf name).microvm or null;
      in
      {
        inherit name;
        cid =
          if
            microvm == null || hasSocket microvm.hypervisor || microvm.hypervisor == "stratovirt"
          then
            null
          else
            microvm.vsock.cid;
      }
    ) (removeAttrs microvms (lib.attrNames cfg.vms));

  assertionsOf =
    name: vm:
    let
      option = "services.guestagent.vms.${name}";
      guest = guestOf name;
      isMicrovm = microvms ? ${name};
      given = isMicrovm && isGiven microvms.${name};
      agent = guest.services.guestagent or { };
      # Where the guest's configuration is.
      there =
        if given then
          "the guest's own configuration, which comes evaluated, so that nothing can be set in it from here"
        else
          "microvm.vms.${name}.config";

      others = removeAttrs cfg.vms [ name ];
      withSame =
        key:
        lib.optionals (vm.${key} != null) (
          lib.attrNames (lib.filterAttrs (_: other: other.${key} == vm.${key}) others)
        );
      sameCid = lib.filter (other: other.name != name && vm.cid != null && other.cid == vm.cid) cids;
      samePort = lib.filter (other: vm.cid != null && others.${other}.cid != null) (
        withSame "providerPort"
      );
      sameSocket = withSame "socket";

      destinations = map (c: c.destination) (credentialsOf vm);
      twice = lib.filter (d: lib.count (other: other == d) destinations > 1) destinations;
      unprovided = map (c: c.name) (
        lib.filter (c: c.required && !(lib.elem c.name destinations)) (
          lib.attrValues (agent.credentials or { })
        )
      );
      address = agent.settings.provider.address or null;
    in
    [
      {
        assertion =
          lib.stringLength name <= 78 && builtins.match "[a-zA-Z0-9_][a-zA-Z0-9._@-]*" name != null;
        message = "${option}: units and sockets are named for the VM, so that its name has 1 to 78 letters, digits, '.', '_', '-' and '@', and begins with a letter, a digit or '_'. Give the VM another name";
      }
      {
        assertion = vm.hypervisor != "stratovirt";
        message = "${option}: microvm.nix gives no vsock to stratovirt, so that the guest can neither call nor be called. Choose another microvm.hypervisor";
      }
      {
        assertion = vm.hypervisor == "stratovirt" || vm.cid != null || vm.socket != null;
        message =
          "${option}: nothing says how the guest is reached. "
          + (
            if isMicrovm then
              "Set microvm.vsock.cid in ${there}, to a number from 3 on that no other VM has"
            else if hasSocket vm.hypervisor then
              "Set ${option}.socket to the path where ${vm.hypervisor} shows vsock"
            else
              "Set ${option}.cid, or ${option}.socket where the VMM shows vsock as a Unix socket"
          );
      }
      {
        assertion = vm.cid == null || vm.socket == null;
        message = "${option}: it has a cid and a socket, and is reached by one of the two. Leave cid out where the VMM shows vsock as a Unix socket, and socket where it does not";
      }
      {
        assertion = vm.cid == null || !(hasSocket vm.hypervisor);
        message = "${option}.cid: ${toString vm.hypervisor} shows vsock as a Unix socket, and not under a CID. Set ${option}.socket in its place";
      }
      {
        assertion = vm.cid == null || vm.cid >= 3 && vm.cid <= 4294967294;
        message = "${option}.cid: ${toString vm.cid} cannot be a VM's. Choose one from 3 on";
      }
      {
        assertion = sameCid == [ ];
        message = "${option}.cid: ${toString vm.cid} is also that of ${(lib.head sameCid).name}, and one of them would be given the credentials of the other. Give one another microvm.vsock.cid, or cid";
      }
      {
        assertion = samePort == [ ];
        message = "${option}.providerPort: ${toString vm.providerPort} is also that of ${lib.head samePort}, and over AF_VSOCK the VMs share the host's ports. Set providerPort of one of them to another one from 768 to 1021";
      }
      {
        assertion =
          vm.socket == null
          ||
            builtins.match "/[a-zA-Z0-9._/@+-]+" vm.socket != null
            && lib.stringLength "${vm.socket}_1021" <= 107;
        message = "${option}.socket: it should be an absolute path of letters, digits and ._/@+-, and of 102 bytes at most: with _1021 behind it, it is the path of the provider's socket. Choose a shorter folder, with microvm.nix by microvm.stateDir";
      }
      {
        assertion = sameSocket == [ ];
        message = "${option}.socket: it is also that of ${lib.head sameSocket}, and one of them would be given the credentials of the other. Give each VM a folder of its own";
      }
      {
        assertion = twice == [ ];
        message = "${option}.credentials: two of them are ${lib.head twice} in the guest. Give one of them another destination";
      }
      {
        assertion = vm.gate == null || secondsOf vm.gate <= 3600;
        message = "${option}.gate: ${toString vm.gate} is too long. Take 1h at most";
      }
      {
        assertion = vm.gate == null || vm.refresh != "none";
        message = "${option}.gate: nothing is refreshed that it could watch. Leave out refresh = \"none\", or gate";
      }
    ]
    ++ lib.concatLists (
      lib.mapAttrsToList (
        entry: c:
        let
          this = "${option}.credentials.${entry}";
          prefixes = [
            vm.credentialPrefix
          ]
          ++ lib.optional (vm.boot.credentials && c.required) bootPrefix
          ++ lib.optional (!c.required) (storeName name { destination = ""; });
          room = 255 - lib.foldl' lib.max 0 (map lib.stringLength prefixes);
        in
        [
          {
            # NixOS' switch takes a quote in front for one around the value. With a space or a backslash in it, services fail
            # from systemd 254 on.
            assertion =
              builtins.match "[]!#-&(-.0-9;-[^-~][]!-.0-9;-[^-~]*" c.destination != null
              && lib.stringLength c.destination <= room
              && !(lib.hasPrefix "." "${vm.credentialPrefix}${c.destination}");
            message = "${this}.destination: it cannot be the name of a credential here. Take 1 to ${toString room} printable ASCII characters without /, :, \\ and spaces, and with neither . nor a quote in front";
          }
          {
            assertion = (c.source == null) != (c.sops == null);
            message = "${this}: it has ${
              if c.source == null then "neither source nor sops" else "source and sops"
            }. Set one of them: source to the path of a file, or sops to the name of a secret of sops-nix";
          }
          {
            assertion = c.sops == null || hasSops;
            message = "${this}.sops: this host has no sops-nix. Import its module, or set source in place of sops";
          }
          {
            assertion = c.source == null || builtins.match "/[^[:cntrl:]]+" c.source != null;
            message = "${this}.source: it is not an absolute path. Write the whole path of the file on this host";
          }
          {
            # From systemd 254 on.
            assertion = c.source == null || !(lib.hasInfix " " c.source || lib.hasInfix "\\" c.source);
            message = "${this}.source: no service can load a file with a space or a backslash in its path. Give it another one, or a link to it";
          }
          {
            assertion =
              c.source == null
              || !(lib.hasPrefix "${builtins.storeDir}/" c.source)
                && !(lib.hasPrefix "${builtins.storeDir}/" (
                  toString (config.environment.etc.${lib.removePrefix "/etc/" c.source}.source or "")
                ));
            message = "${this}.source: it is in the Nix store, where everybody can read it. Take a file that is outside of it and that the configuration does not have, or sops";
          }
          {
            # NixOS takes it for a pattern in the link that leads there.
            assertion = c.required || c.source == null || !(lib.hasInfix "*" c.source);
            message = "${this}.source: it has a '*', and is not required. Take a path without, or leave out required = false";
          }
          {
            assertion = !vm.boot.credentials || !c.required || !(lib.hasInfix "=" c.destination);
            message = "${this}.destination: it has a '=', which ends a name in an OEM string. Take another name, or leave out ${option}.boot.credentials: the provider hands it over";
          }
        ]
      ) vm.credentials
    )
    ++ lib.optional (guest != null) {
      assertion = agent.enable or false;
      message =
        "${option}: the guest has no agent, which takes the credentials. "
        + (
          if given then
            "Import the guest's module and set services.guestagent.enable = true in ${there}"
          else
            "Leave out services.guestagent.enable = false in ${there}, or else ${option}"
        );
    }
    ++ lib.optionals (agent.enable or false) [
      {
        assertion = agent.vsock.enable or true;
        message = "${option}: the guest has services.guestagent.vsock.enable = false, and is reached by vsock alone. Leave that out in ${there}";
      }
      {
        assertion = (agent.vsock.port or 1022) == vm.port;
        message = "${option}.port: it is ${toString vm.port}, and the guest's agent listens at ${
          toString (agent.vsock.port or 1022)
        }. Leave port out";
      }
      {
        assertion =
          address == null
          || address == providerAddress vm
          # The agent's default port.
          || vm.providerPort == 1021 && address == "vsock:2";
        message = "${option}: the guest calls ${toString address}, and its provider listens at ${providerAddress vm}. Set services.guestagent.provider.address = \"${providerAddress vm}\" in ${there}, or ${option}.providerPort here";
      }
      {
        assertion = vm.socket == null || (agent.settings.peer.privilegedPort or null) == "ignored";
        message = "${option}: the guest refuses calls from ports that are not privileged, and a VMM that shows vsock as a Unix socket calls from such. Set services.guestagent.peer.privilegedPort = \"ignored\" in ${there}";
      }
      {
        assertion = unprovided == [ ];
        message = "${option}.credentials: the guest requires ${lib.concatStringsSep ", " unprovided}, which nobody hands over. Add ${option}.credentials.${builtins.toJSON (lib.head unprovided)}, or set required = false in the guest's services.guestagent.credentials";
      }
    ]
    ++ lib.optionals (hasBoot vm) (
      [
        {
          assertion = bootKind name vm != null;
          message = "${option}.boot: from here this VM cannot be given OEM strings. That takes x86-64 and microvm.vms.${name}.config, and there microvm.hypervisor = \"cloud-hypervisor\", or \"qemu\" with microvm.qemu.machine = \"q35\". Leave boot out, and the provider hands the credentials over; or have the VM's unit run guestctl boot-args";
        }
        {
          assertion = bootKind name vm != "qemu" || guest.microvm.extraArgsScript == bootArgs name vm;
          message = "${option}.boot: microvm.extraArgsScript in ${there} is another script, and is what gives QEMU the strings. Leave that out; or have it print on its line what this prints, too, and leave boot out here: ${bootArgs name vm}";
        }
        {
          assertion = lib.length (vm.boot.strings ++ bootCredentials vm) <= 255;
          message = "${option}.boot: these are more than 255 strings, which SMBIOS cannot count. Leave out boot.credentials: the provider hands them over";
        }
        {
          assertion =
            bootKind name vm != "cloud-hypervisor" || bootCredentials vm == [ ] || vm.exposeOnCommandLine;
          message = "${option}.boot.credentials: cloud-hypervisor takes OEM strings from its command line only, where every user of this host reads them. Leave it out: the provider hands the credentials over. Where that does not matter, on a machine for tests, set ${option}.exposeOnCommandLine = true";
        }
      ]
      ++ map (s: {
        assertion =
          builtins.match "[!-~]([ -~]*[!-~])?" s != null
          && !(lib.hasPrefix "io.systemd.credential" s || lib.hasPrefix "io.guestagent.credential" s);
        message = "${option}.boot.strings: one is a credential, which everybody could read, or not printable ASCII, or has a space at an end. For a secret take ${option}.credentials, and boot.credentials";
      }) vm.boot.strings
      ++ map (s: {
        assertion = !(lib.any (c: lib.hasInfix c s) (unfit.${toString (bootKind name vm)} or [ ]));
        message = "${option}.boot.strings: ${s} has one of the characters ${
          lib.concatMapStringsSep ", " builtins.toJSON unfit.${bootKind name vm}
        }, which ${
          if bootKind name vm == "qemu" then
            "the shell that starts QEMU does not leave alone"
          else
            "cloud-hypervisor cannot pass on"
        }. Write it without";
      }) vm.boot.strings
    );

  exposed = lib.filterAttrs (
    name: vm: bootsBy "cloud-hypervisor" name vm && bootCredentials vm != [ ] && vm.exposeOnCommandLine
  ) cfg.vms;

  listen = "${
    if lib.hasInfix ":" cfg.exporter.listenAddress then
      "[${cfg.exporter.listenAddress}]"
    else
      cfg.exporter.listenAddress
  }:${toString cfg.exporter.port}";

  # Of a gate.
  secondsOf =
    time:
    let
      parts = builtins.match "([0-9]+)(.)" time;
    in
    builtins.fromJSON (lib.head parts)
    * {
      s = 1;
      m = 60;
      h = 3600;
    }.${lib.elemAt parts 1};

  hasVhost = lib.any (vm: vm.cid != null) (lib.attrValues cfg.vms);

  allOf = kind: lib.mapAttrsToList (name: vm: (unitsOf name vm).${kind}) cfg.vms;
in
{
  options = {
    services.guestagent = {
      hostPackage = lib.mkOption {
        type = types.package;
        default = pkgs.callPackage ./guestctl.nix { };
        defaultText = lib.literalExpression "pkgs.callPackage ./guestctl.nix { }";
        description = "The package with guestctl and its units.";
      };

      vms = lib.mkOption {
        type = types.attrsOf (types.submodule vm);
        default = { };
        example = lib.literalExpression ''
          {
            web.credentials.db-password.source = "/var/lib/secrets/web-db-password";
          }
        '';
        description = ''
          The VMs of this host that are given credentials, and that guestctl knows, by name. For a VM of microvm.nix it is
          the name in `microvm.vms`; where that has `config`, the guest's module is imported there, enabled, and told of
          its provider. When a VM is removed here, its provider stops with the switch, and the guest keeps what it has
          until it boots anew.
        '';
      };

      exporter = {
        enable = lib.mkEnableOption "the exporter, which tells Prometheus how the VMs are";
        listenAddress = lib.mkOption {
          type = types.str;
          default = "127.0.0.1";
          description = "The address where it is scraped. Everybody who can connect may read.";
        };
        port = lib.mkOption {
          type = types.port;
          default = 9774;
          description = "The TCP port where it is scraped.";
        };
      };
    };

    # Declared a second time: a definition would make VMs that are not there, and a module of the type adds to those that
    # are. Where there is no first declaration, nobody sees this one.
    microvm.vms = lib.mkOption {
      visible = options.microvm ? host;
      type = types.attrsOf (
        types.submodule (
          { name, ... }:
          {
            config.extraModules = lib.mkIf (cfg.vms ? ${name}) [ (guestModule name) ];
          }
        )
      );
    };
  };

  config = lib.mkMerge [
    (lib.mkIf (cfg.vms != { } || cfg.exporter.enable) {
      systemd.packages = [ cfg.hostPackage ];
      environment.systemPackages = [ cfg.hostPackage ];
      users.groups.guestagent = { };
    })
    (lib.mkIf (cfg.vms != { }) {
      assertions = lib.concatLists (lib.mapAttrsToList assertionsOf cfg.vms);
      warnings =
        lib.mapAttrsToList (
          name: _:
          "services.guestagent.vms.${name}.exposeOnCommandLine: its credentials stand on the command line of cloud-hypervisor, where every user of this host reads them, and in its snapshots"
        ) exposed
        ++ map (
          name:
          "services.guestagent.vms.${name}: a switch leaves units alone that have a '.' behind their '@'. After a change run systemctl restart ${provider name}, or give the VM a name without"
        ) (lib.filter (lib.hasInfix ".") (lib.attrNames cfg.vms));

      systemd.services = lib.mkMerge (
        [
          {
            "guestagent-provide@" = providerOfAll;
            "guestagent-ready@" = readyOfAll;
          }
        ]
        ++ allOf "services"
      );
      systemd.paths = lib.mkMerge (allOf "paths");

      # Who may open it can have any CID that is free, also that of a VM which is off, and be given its credentials. By
      # default everybody may.
      boot.kernelModules = lib.mkIf hasVhost [ "vhost_vsock" ];
      services.udev.extraRules = lib.mkIf hasVhost ''
        KERNEL=="vhost-vsock", GROUP="kvm", MODE="0660"
      '';
      systemd.tmpfiles.rules = lib.mkIf hasVhost [ "z /dev/vhost-vsock 0660 - kvm" ];

      environment.etc = lib.mkMerge (
        lib.mapAttrsToList (
          name: vm:
          {
            "guestagent/vms.d/${name}.json".text = registration vm;
          }
          // lib.listToAttrs (
            map (c: lib.nameValuePair "credstore/${storeName name c}" { source = sourceOf c; }) (
              lib.filter (c: !c.required) (credentialsOf vm)
            )
          )
        ) cfg.vms
      );
    })
    (lib.mkIf cfg.exporter.enable {
      systemd.sockets.guestagent-exporter = {
        wantedBy = [ "sockets.target" ];
        listenStreams = lib.mkIf (listen != "127.0.0.1:9774") [
          ""
          listen
        ];
      };
      systemd.services.guestagent-exporter = {
        wantedBy = [ "multi-user.target" ];
        # A switch opens the socket anew together with its service only.
        restartTriggers = [ listen ];
      };
    })
    (lib.optionalAttrs hasSops {
      sops.secrets = lib.mkMerge (
        lib.mapAttrsToList (
          name: vm:
          lib.listToAttrs (
            map (c: lib.nameValuePair c.sops { restartUnits = [ "${provider name}.service" ]; }) (
              lib.filter (c: c.sops != null) (credentialsOf vm)
            )
          )
        ) cfg.vms
      );
    })
  ];
}
