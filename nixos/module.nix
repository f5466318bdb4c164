# services.guestagent: the agent in a NixOS guest.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  cfg = config.services.guestagent;
  json = pkgs.formats.json { };
  inherit (lib) types;

  # An option that is not written into config.json unless somebody sets it: the agent knows its defaults.
  optionalKey =
    option:
    lib.mkOption (
      option
      // {
        type = types.nullOr option.type;
        default = null;
      }
    );
  withoutUnset =
    settings:
    lib.filterAttrs (_: v: v != null && v != { } && v != [ ]) (
      lib.mapAttrs (_: v: if lib.isAttrs v then withoutUnset v else v) settings
    );
  # From how many percent on.
  threshold =
    description:
    optionalKey {
      type = types.ints.between 1 101;
      inherit description;
    };

  # Units may be named as in systemd.services, or with their suffix.
  unitOf = service: if lib.hasSuffix ".service" service then service else "${service}.service";
  withSuffix = unit: if isUnit unit then unit else "${unit}.service";
  isUnit =
    unit:
    lib.any (suffix: lib.hasSuffix ".${suffix}" unit) [
      "automount"
      "device"
      "mount"
      "path"
      "scope"
      "service"
      "slice"
      "socket"
      "swap"
      "target"
      "timer"
    ];
  unitType = types.strMatching "[a-zA-Z0-9@%:_.\\-]+";

  # Where a unit finds a credential that it loads.
  pathIn =
    name: service:
    let
      unit = unitOf service;
    in
    if lib.hasSuffix "@.service" unit then
      throw "services.guestagent.credentials: ${unit} is a template, and each of its instances finds ${name} at a path of its own. Name the instance in services, or write %d/${name} in the unit"
    else
      "/run/credentials/${unit}/${name}";

  credential =
    { name, config, ... }:
    {
      options = {
        name = lib.mkOption {
          type = types.str;
          default = name;
          defaultText = lib.literalMD "the attribute's name";
          description = "The credential's name, as the host gives it and the services load it.";
        };
        required = lib.mkOption {
          type = types.bool;
          default = true;
          description = ''
            Whether the services start only with the credential. The host's module asserts that it has a source for each
            one that is required.
          '';
        };
        via = lib.mkOption {
          type = types.enum [
            "path"
            "socket"
          ];
          default = "path";
          description = ''
            How the services load it. With `path` they start after `guestagent-credentials.target`, and load the file in
            `/run/credstore`; where it is missing, they fail if it is `required`. With `socket` they load it from the
            agent, and wait for it: as long as their own start may take, or `settings.socket.wait`.
          '';
        };
        services = lib.mkOption {
          type = types.listOf unitType;
          default = [ ];
          example = [ "nginx" ];
          description = ''
            The services that load it, each as `"nginx"` or `"nginx.service"`. They may be defined anywhere; an instance
            such as `"worker@1"` keeps its template. What the service itself is to read is `path`, or `pathFor`.
          '';
        };
        restartUnits = lib.mkOption {
          type = types.listOf unitType;
          default = [ ];
          example = [ "pgbouncer.service" ];
          description = "Units to restart when it changes, whether they load it or not.";
        };
        reloadUnits = lib.mkOption {
          type = types.listOf unitType;
          default = [ ];
          example = [ "nginx.service" ];
          description = "Units to reload when it changes, whether they load it or not. See `onChange` for those that do.";
        };
        onChange = optionalKey {
          type = types.enum [
            "none"
            "auto"
            "reload"
            "restart"
          ];
          description = ''
            How the services that load it are refreshed when it changes and the host does not say; by default not at all.
            `auto` reloads those that are told of it, by `ExecReload=` or `Type=notify-reload`, where a reload brings new
            credentials, from systemd 260 on, and restarts the others. Where the program does not read the file again at
            a reload, take `restart`. `reload` never restarts. For both, and in `reloadUnits`, they get
            `RefreshOnReload=credentials`.
          '';
        };
        path = lib.mkOption {
          type = types.str;
          readOnly = true;
          default =
            if lib.length config.services == 1 then
              pathIn config.name (lib.head config.services)
            else if config.services == [ ] then
              throw "services.guestagent.credentials.${name}.path: no service loads it. Name the one that does in services.guestagent.credentials.${name}.services"
            else
              throw "services.guestagent.credentials.${name}.path: ${toString (lib.length config.services)} services load it, each from a path of its own. Take pathFor.\"${lib.head config.services}\" and so on";
          defaultText = lib.literalMD "`/run/credentials/UNIT.service/NAME`";
          description = ''
            Where the service finds it, if it is one. The file is that service's alone, whatever user it runs as, and is
            there while it runs.
          '';
        };
        pathFor = lib.mkOption {
          type = types.attrsOf types.str;
          readOnly = true;
          default = lib.genAttrs config.services (pathIn config.name);
          defaultText = lib.literalMD "`{ UNIT = \"/run/credentials/UNIT.service/NAME\"; }`";
          description = "Where each of the services finds it, by the service as it is written in `services`.";
        };
      };
    };

  # What is loaded: one element for each credential and each of its services.
  loads = lib.concatLists (
    lib.mapAttrsToList (
      entry: c:
      map (service: {
        inherit entry;
        inherit (c) name required via;
        unit = unitOf service;
        # Whatever entry of that name says so.
        reload = lib.any (
          other:
          other.name == c.name
          && (other.onChange == "reload" || lib.elem (unitOf service) (map withSuffix other.reloadUnits))
        ) (lib.attrValues cfg.credentials);
        auto = lib.any (other: other.name == c.name && other.onChange == "auto") (
          lib.attrValues cfg.credentials
        );
      }) c.services
    ) cfg.credentials
  );

  # Specifiers are expanded in both halves of LoadCredential=.
  loadCredential =
    load:
    let
      name = lib.replaceStrings [ "%" ] [ "%%" ] load.name;
    in
    if load.via == "socket" then
      "${name}:/run/guestagent/credentials.sock"
    else if load.required then
      "${name}:/run/credstore/${name}"
    else
      name;

  # Fails where systemd took a connection that broke off for an empty value, and makes a unit of Type=simple wait.
  # systemd expands the variable. What a package's unit has before its start comes before this.
  testCredential =
    load:
    let
      name =
        lib.replaceStrings
          [
            "\""
            "'"
            "%"
            "$"
          ]
          [
            "\\\""
            "\\'"
            "%%"
            "$$"
          ]
          load.name;
    in
    "${pkgs.coreutils}/bin/test -s \${CREDENTIALS_DIRECTORY}/${name}";

  refreshesOnReload = lib.versionAtLeast config.systemd.package.version "260";

  # What NixOS is to add to a service, by its name in systemd.services.
  consumer =
    service:
    let
      mine = lib.filter (load: load.unit == unitOf service) loads;
      overSocket = lib.filter (load: load.via == "socket") mine;
      byPath = lib.filter (load: load.via == "path") mine;
      inherit (config.systemd.services.${service}) serviceConfig;
      # What NixOS itself has no command for is an instance of a template, or comes from a package.
      isElsewhere = !(serviceConfig ? ExecStart || serviceConfig ? ExecStop);
      isInstance = builtins.match "[^@]*@.+" (lib.removeSuffix ".service" service) != null;
      isTold =
        isElsewhere || serviceConfig ? ExecReload || serviceConfig.Type or null == "notify-reload";
    in
    {
      # NixOS would write an instance as a unit of its own, which has nothing to run, and give it a PATH that takes the
      # place of the template's.
      overrideStrategy = lib.mkIf isElsewhere (lib.mkDefault "asDropin");
      enableDefaultPath = lib.mkIf (isElsewhere && isInstance) (lib.mkDefault false);
      after =
        lib.optional (overSocket != [ ]) "guestagent-credentials.socket"
        ++ lib.optional (byPath != [ ]) "guestagent-credentials.target";
      # The socket, too: a switch that brings the module starts targets one by one, and After= alone would not have the
      # service wait for a socket that only a later one pulls in.
      wants =
        lib.optional (overSocket != [ ]) "guestagent-credentials.socket"
        ++ lib.optional (byPath != [ ]) "guestagent-credentials.target";
      serviceConfig = {
        LoadCredential = map loadCredential mine;
        # Only for who asks for it, and with `auto` for who is told: it makes every unit one that can be reloaded. mkOrder
        # keeps the module system from looking at the value, which depends on other keys, while it collects the keys.
        RefreshOnReload = lib.mkIf (refreshesOnReload && lib.any (load: load.reload || load.auto) mine) (
          lib.mkDefault (
            lib.mkOrder 1000 (if isTold || lib.any (load: load.reload) mine then "credentials" else [ ])
          )
        );
        ExecStartPre = lib.mkIf (overSocket != [ ]) (lib.mkBefore (map testCredential overSocket));
      };
    };

  # Begin the names on which systemd itself acts: the host may set them while the guest runs only if names.allow has
  # them. internal/agent/names.go has them for the agent.
  deniedPrefixes = [
    "cryptenroll."
    "cryptsetup."
    "firstboot."
    "fsck."
    "fstab."
    "getty."
    "home."
    "import."
    "io.systemd."
    "journal."
    "login."
    "network."
    "passwd."
    "quotacheck."
    "shell."
    "ssh."
    "sysctl."
    "system."
    "systemd."
    "sysusers."
    "tmpfiles."
    "udev."
    "userdb."
    "vconsole."
    "veritysetup."
    "vmm."
  ];
  denied =
    name:
    lib.any (prefix: lib.hasPrefix prefix name) deniedPrefixes
    && !(lib.any (
      allowed:
      name == allowed || lib.hasSuffix "*" allowed && lib.hasPrefix (lib.removeSuffix "*" allowed) name
    ) (cfg.settings.names.allow or [ ]));

  providerAddress = cfg.settings.provider.address or null;
  # The provider answers by calling the agent. One on a Unix socket is for containers.
  reachable = cfg.vsock.enable || providerAddress != null && lib.hasPrefix "unix:" providerAddress;

  sopsKey = config.sops.age.keyFile or null;

  configFile = json.generate "guestagent-config.json" cfg.settings;
  # The program says what is wrong in the file, and a system with such a file is not built.
  checkConfig = pkgs.runCommand "guestagent-check-config" { } ''
    install -D -m 444 ${configFile} root/etc/guestagent/config.json
    if ! ${cfg.package}/bin/guestagent --root root check-config; then
      echo "The file is made of services.guestagent.settings, and of the options that are written into it." >&2
      exit 1
    fi
    touch "$out"
  '';

  # Nothing else would notice a service that is not there: the drop-in for it is never read.
  checkServices =
    pkgs.runCommand "guestagent-check-services" { units = config.environment.etc."systemd/system".source; }
      (
        lib.concatMapStringsSep "" (
          load:
          let
            instance = builtins.match "([^@]*@).*[.]service" load.unit;
            file = if instance == null then load.unit else "${lib.head instance}.service";
          in
          ''
            if ! [ -e "$units/${load.unit}" ] && ! [ -e "$units/${file}" ]; then
              echo ${lib.escapeShellArg "services.guestagent.credentials.${load.entry}.services: this system has no ${load.unit}. Correct the name; for a unit that a generator makes, write LoadCredential= in its own configuration"} >&2
              exit 1
            fi
          ''
        ) loads
        + ''
          touch "$out"
        ''
      );

  # A drop-in that the package has and that is not for everybody.
  dropIn =
    unit: name:
    pkgs.linkFarm "guestagent-${name}" {
      "lib/systemd/system/${unit}.d/${name}.conf" = "${cfg.package}/share/guestagent/${name}.conf";
    };
in
{
  # The host's module imports this into its guests, who may import it themselves, perhaps from another revision.
  key = "github.com/guestagent/guestagent/nixos/module.nix";

  options.services.guestagent = {
    enable = lib.mkEnableOption "guestagent, which installs the credentials that the host gives this VM";

    package = lib.mkOption {
      type = types.package;
      default = pkgs.callPackage ./package.nix { };
      defaultText = lib.literalExpression "pkgs.callPackage ./package.nix { }";
      description = "The package with the agent and its units.";
    };

    smbios.enable = lib.mkOption {
      type = types.bool;
      default = true;
      description = ''
        Whether to take credentials from the VM's SMBIOS OEM strings at boot. In a confidential VM, where the host, who
        writes them, is not trusted, the agent does that only with `settings.smbios.read = "always"`.
      '';
    };

    vsock = {
      enable = lib.mkOption {
        type = types.bool;
        default = true;
        description = "Whether the host can call the agent over vsock. Off, for a VM without vsock, no provider is asked either.";
      };
      port = lib.mkOption {
        type = types.ints.between 1 1023;
        default = 1022;
        description = ''
          The vsock port that the host calls; below 1024, where nobody but root in the guest can listen. A switch leaves
          the socket as it is: another port is in force from the next boot on.
        '';
      };
    };

    peer.privilegedPort = lib.mkOption {
      type = types.nullOr (
        types.enum [
          "required"
          "ignored"
        ]
      );
      default =
        if
          lib.elem (config.microvm.hypervisor or null) [
            "cloud-hypervisor"
            "firecracker"
          ]
        then
          "ignored"
        else
          null;
      defaultText = lib.literalMD "`\"ignored\"` where `microvm.hypervisor` is cloud-hypervisor or firecracker, else `null`";
      description = ''
        Whether the host has to call from a port below 1024, which only its root can; `null` is `required`. `ignored` is
        for VMMs that show vsock as a Unix socket (cloud-hypervisor, Firecracker, vhost-device-vsock): they choose the
        port, and the permissions of that socket are the guard.
      '';
    };

    provider = {
      address = lib.mkOption {
        type = types.nullOr types.str;
        default = if cfg.vsock.enable then "vsock:2:1021" else null;
        defaultText = lib.literalExpression ''if config.services.guestagent.vsock.enable then "vsock:2:1021" else null'';
        example = "vsock:2:1020";
        description = ''
          Where the host's provider listens, `vsock:2[:PORT]`; on a host with vhost-vsock, a port from 768 to 1021 that is
          this guest's alone. The host's module sets it. With `null` the guest asks whom the host names at boot (an OEM
          string, the kernel command line or a system credential), which an address here goes before; or nobody: that is
          for a host without a provider, for which a boot would otherwise wait. A switch does not ask anew: another address
          is in force from the next boot on.
        '';
      };
      timeout = optionalKey {
        # The longest time that the agent takes is a year.
        type = types.ints.between 0 (366 * 24 * 60 * 60);
        example = 120;
        description = "How many seconds `guestagent-credentials.target` waits for the provider. By default 30.";
      };
      required = lib.mkOption {
        type = types.bool;
        default = false;
        description = ''
          Whether `guestagent-credentials.target` fails when the provider has not handed over the credentials in time. By
          default it is reached then all the same, and the provider is asked again later.
        '';
      };
      holdBoot = lib.mkOption {
        type = types.bool;
        default = false;
        description = ''
          Whether every ordinary service starts after `guestagent-credentials.target`: once the host has handed over the
          credentials, or the time for that is up. By default only those services do that load one, or say so themselves.
        '';
      };
    };

    credentials = lib.mkOption {
      type = types.attrsOf (types.submodule credential);
      default = { };
      example = lib.literalExpression ''
        {
          db-password = {
            services = [ "web" ];
            onChange = "restart";
          };
        }
      '';
      description = ''
        The credentials that services of this guest load, and what a change of one brings about. What the host gives
        without an entry here is installed all the same.
      '';
    };

    health = {
      ignoreUnits = lib.mkOption {
        type = types.listOf types.str;
        default = [ ];
        example = [ "nightly-*.service" ];
        description = "Units, with wildcards, whose failure says nothing about the guest's health.";
      };
      disk = {
        degraded = threshold "From how many percent in use a file system makes the guest degraded. By default 90; 101 is never.";
        failing = threshold "From how many percent in use a file system makes the guest failing. By default 98; 101 is never.";
      };
      memory = {
        degraded = threshold "From how many percent of ten seconds in which some task waited for memory the guest is degraded. By default 20; 101 is never.";
        failing = threshold "From how many percent of ten seconds in which everything waited for memory the guest is failing. By default 20; 101 is never.";
      };
    };

    settings = lib.mkOption {
      inherit (json) type;
      default = { };
      example = lib.literalExpression ''
        {
          policy.load."db-*" = [ "web.service" ];
          previous.ttl = 3600;
        }
      '';
      description = ''
        What else `/etc/guestagent/config.json` says; docs/operations.md lists the keys. The options above are written
        into it, and the whole is checked when the system is built. What an option has written here, only `lib.mkForce`
        replaces.
      '';
    };
  };

  config = lib.mkIf cfg.enable {
    assertions =
      lib.concatLists (
        lib.mapAttrsToList (
          entry: c:
          let
            option = "services.guestagent.credentials.${entry}";
          in
          [
            {
              assertion =
                lib.stringLength c.name <= 255
                # Printable, without / : \ and space. With a space in it, services fail from systemd 254 on.
                && builtins.match "[]!-.0-9;-[^-~]+" c.name != null
                && c.name != "."
                && c.name != "..";
              message = "${option}.name: no service could load a credential of that name. Take 1 to 255 printable ASCII characters without /, :, \\ and spaces, and neither . nor ..";
            }
            {
              assertion = !(cfg.vsock.enable && denied c.name);
              message = "${option}.name: systemd itself acts on ${c.name}, so the agent lets the host set it at boot by SMBIOS only. If the host may do what systemd does with it, set services.guestagent.settings.names.allow = [ \"${c.name}\" ]; else take another name";
            }
            {
              assertion = c.required || c.via == "path";
              message = "${option}: over the socket a service waits until its credential is there, so that it cannot do without. Set via = \"path\", or leave out required = false";
            }
          ]
          ++ map (service: {
            assertion = !(isUnit service) || lib.hasSuffix ".service" service;
            message = "${option}.services: ${service} is not a service. systemd gives credentials to the commands of services only: name the service";
          }) c.services
        ) cfg.credentials
      )
      ++ map (load: {
        assertion = load.via != "socket" || lib.stringLength (load.unit + load.name) <= 83;
        message = "services.guestagent.credentials.${load.entry}: ${load.unit} and ${load.name} have more than 83 bytes together, which is all that systemd can tell the agent over the socket. Take a shorter name, or via = \"path\"";
      }) loads
      ++ map (
        load:
        let
          inherit (config.systemd.services.${lib.removeSuffix ".service" load.unit}) serviceConfig;
          idOf = line: lib.head (builtins.match "([^:]*):?.*" line);
          same = line: idOf line == idOf (loadCredential load);
        in
        {
          # systemd takes one of the two.
          assertion = lib.length (lib.filter same (lib.toList serviceConfig.LoadCredential)) == 1;
          message = "services.guestagent.credentials.${load.entry}: ${load.unit} would load ${load.name} twice. Name the service once, in one entry with that name, and leave the name out of the unit's own LoadCredential=";
        }
      ) loads
      ++ [
        {
          assertion = reachable || providerAddress == null;
          message = "services.guestagent.provider.address: the provider hands over its credentials by calling the agent, which vsock.enable = false keeps it from. Set services.guestagent.vsock.enable = true, or provider.address = null";
        }
        {
          assertion = reachable || !(cfg.provider.holdBoot || cfg.settings.provider.required or false);
          message = "services.guestagent.provider: holdBoot and required wait for a provider, and with vsock.enable = false none can call the agent. Set services.guestagent.vsock.enable = true, or leave out holdBoot and required";
        }
        {
          assertion =
            sopsKey == null
            || !(lib.hasPrefix "/run/credstore/" (toString sopsKey))
              && !(lib.hasPrefix "/run/credentials/" (toString sopsKey))
            || config.sops.useSystemdActivation or false;
          message = "sops.age.keyFile: ${toString sopsKey} is there once units run, and sops-nix looks for it before. Set sops.useSystemdActivation = true, which has sops-install-secrets.service do that";
        }
      ];

    warnings = map (
      load:
      "services.guestagent.credentials.${load.entry}: ${load.unit} is to be reloaded when ${load.name} changes, and would go on with the old value: only from systemd 260 on does a reload bring a new one. Set onChange = \"restart\""
    ) (lib.filter (load: load.reload && !refreshesOnReload) loads);

    services.guestagent.settings = lib.mkMerge (
      [
        (withoutUnset {
          health = {
            inherit (cfg.health) disk ignoreUnits memory;
          };
          peer = { inherit (cfg.peer) privilegedPort; };
          provider = {
            inherit (cfg.provider) address timeout;
            required = if cfg.provider.required then true else null;
          };
          smbios.read = if cfg.smbios.enable then null else "never";
        })
      ]
      # Several entries may have one name, each for other services.
      ++ map (
        c:
        withoutUnset {
          credentials.${c.name} = {
            inherit (c) onChange;
            reloadUnits = map withSuffix c.reloadUnits;
            restartUnits = map withSuffix c.restartUnits;
          };
        }
      ) (lib.attrValues cfg.credentials)
    );

    environment.etc."guestagent/config.json".source = configFile;
    environment.systemPackages = [ cfg.package ];
    system.checks =
      lib.optional (pkgs.stdenv.buildPlatform.canExecute pkgs.stdenv.hostPlatform) checkConfig
      ++ lib.optional (loads != [ ]) checkServices;

    # NixOS takes the units from the package but ignores their [Install] sections. run-credstore.mount needs none: the
    # import pulls it in. Nothing is added to it here: a switch restarts a mount that changed, and the store would be lost.
    systemd.packages = [
      cfg.package
    ]
    ++ lib.optional (cfg.settings.consumers.compare or false) (dropIn "guestagent.service" "compare")
    ++ lib.optional cfg.provider.holdBoot (dropIn "guestagent-credentials.target" "hold-boot");
    systemd.sockets.guestagent = {
      # A socket that nothing wants any more goes on listening over a switch; one that is masked is stopped.
      inherit (cfg.vsock) enable;
      wantedBy = lib.mkIf cfg.vsock.enable [ "sockets.target" ];
      # The empty one takes away the port of the package's unit.
      listenStreams = lib.mkIf (cfg.vsock.port != 1022) [
        ""
        "vsock::${toString cfg.vsock.port}"
      ];
    };
    systemd.sockets.guestagent-local.wantedBy = [ "sockets.target" ];
    systemd.sockets.guestagent-credentials.wantedBy = [ "sockets.target" ];
    systemd.sockets.guestagent-report.wantedBy = [ "sockets.target" ];
    systemd.targets.guestagent-credentials.wantedBy = [ "multi-user.target" ];

    systemd.services = lib.mkMerge [
      {
        guestagent-import = {
          wantedBy = [ "sysinit.target" ];
          # So that sops-nix and agenix find their key where that comes with OEM strings: sops.age.keyFile in /run/credstore.
          before = [
            "agenix-install-secrets.service"
            "sops-install-secrets.service"
            "sops-install-secrets-for-users.service"
          ];
        };

        # guestagent-credentials.target requires it: with a restart of it, every unit that requires the target would be
        # restarted too, and wait for the host.
        guestagent-pull.restartIfChanged = false;

        guestagent = {
          # By default a switch stops a changed service, and stops and starts the socket of the same name
          # (switch-to-configuration-ng, handle_modified_unit). If another of our sockets has started the service again by
          # then, systemd does not start guestagent.socket (socket_start: "already active, refusing"). A restart leaves the
          # sockets alone, and systemd keeps the connections of waiting units over it. A socket unit that changed is left
          # as it is, so that there is nothing to say for those.
          stopIfChanged = false;
          # The agent reads its configuration only when it starts, and does not end while a unit waits.
          restartTriggers = [ configFile ];
        };
      }
      (lib.genAttrs (map (load: lib.removeSuffix ".service" load.unit) loads) consumer)
    ];

    # PID 1 imports OEM strings and fw_cfg in the initrd, and loads these there if the initrd has them.
    boot.initrd.availableKernelModules = [
      "dmi_sysfs"
      "qemu_fw_cfg"
    ]
    ++ lib.optional cfg.vsock.enable "vmw_vsock_virtio_transport";
    # Not dmi_sysfs: where the VM has no SMBIOS it cannot be loaded, which would fail systemd-modules-load.service. PID 1
    # tries it by itself, and the agent reads the table without it.
    boot.kernelModules = lib.optional cfg.vsock.enable "vmw_vsock_virtio_transport";
  };
}
