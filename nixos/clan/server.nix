# The machine that runs the VM of an instance, as a NixOS module.
{
  instanceName,
  machineName,
  settings,
  vm,
  # The machines with role guest.
  guests,
}:
{
  config,
  lib,
  options,
  pkgs,
  self,
  ...
}:
let
  oem = import ./oem.nix { inherit lib; };
  place = "clan instance ${instanceName}, roles.server.machines.${machineName}.settings";
  setting = name: "${place}.${name}";

  vars = config.clan.core.vars.generators;
  provider = "guestagent-provide@${vm}.service";
  generated = name: "microvm-${vm}-${name}";

  # What the guest is given: its name there, and the file or the var that it comes from.
  files = lib.mapAttrsToList (
    name: credential:
    let
      orName = value: if value == null then name else value;
    in
    {
      option = "credentials.${name}";
      name = "${settings.credentialPrefix}${orName credential.destination}";
      file = orName credential.file;
      inherit (credential) generator required source;
    }
  ) settings.credentials;
  secrets =
    lib.mapAttrsToList (name: secret: {
      option = "runtimeSecrets.${name}";
      name = if secret.oemCredentialName == null then name else secret.oemCredentialName;
      generator = generated name;
      file = name;
      required = true;
      source = null;
    }) settings.runtimeSecrets
    ++ lib.optional (settings.rootPassword == true) {
      option = "rootPassword";
      name = "root-password";
      generator = generated "root-password";
      file = "hash";
      required = true;
      source = null;
    };
  all = files ++ secrets;

  # The host's module declares microvm.vms, too.
  hasMicrovm = options ? microvm.host;
  # The machine in settings.guest has its role, and microvm.nix' module.
  hasRole = lib.elem settings.guest guests;
  isVM = self.nixosConfigurations.${settings.guest}.config.microvm.guest.enable or false;
  isMachine = settings.guest != null && hasRole && isVM;
  # The VM's own configuration, whoever gives it.
  guest =
    let
      declared = config.microvm.vms.${vm};
    in
    if declared.evaluatedConfig != null then
      declared.evaluatedConfig.config
    else
      declared.config.config;
  bridged = lib.any (interface: interface.type == "bridge") guest.microvm.interfaces;

  generator = file: script: runtimeInputs: {
    files.${file} = { };
    runtimeInputs = lib.mkDefault runtimeInputs;
    script = lib.mkDefault script;
  };
in
{
  _file = place;
  imports = [ ../host.nix ];

  config = lib.mkMerge [
    {
      assertions = [
        {
          assertion = hasMicrovm;
          message = "clan instance ${instanceName}: ${machineName} has no microvm.nix, which runs the VM. Import inputs.microvm.nixosModules.host in the machine's configuration, or in roles.server.extraModules";
        }
        {
          assertion = lib.isBool settings.rootPassword;
          message = "${setting "rootPassword"}: this is the password itself, and everybody would read it in the repository and in the store. Write rootPassword = true, which has clan generate one: clan vars get ${machineName} ${generated "root-password"}/password shows it. And change the one that was written here";
        }
        {
          assertion = lib.all lib.isAttrs settings.guestModules;
          message = "${setting "guestModules"}: settings are JSON, which has no functions, paths or packages. Put the module into roles.server.extraModules, as { microvm.vms.${vm}.extraModules = [ … ]; }";
        }
        {
          assertion = settings.guest == null || hasRole;
          message = "${setting "guest"}: ${toString settings.guest} has no role guest in this instance. Add roles.guest.machines.${toString settings.guest} = { }";
        }
        {
          assertion = settings.guest == null || !hasRole || isVM;
          message = "${setting "guest"}: the machine ${toString settings.guest} is no VM of microvm.nix. Import inputs.microvm.nixosModules.microvm in its configuration";
        }
        {
          assertion = settings.guest == null || settings.guestModules == [ ];
          message = "${setting "guestModules"}: the VM is the machine ${toString settings.guest}, which has a configuration of its own. Write it there, and leave guestModules out";
        }
      ]
      ++ map (credential: {
        assertion = (credential.source == null) != (credential.generator == null);
        message = "${setting credential.option}: ${
          if credential.source == null then "it comes from nowhere" else "source and generator are both set"
        }. Set source to a path on ${machineName}, or generator to the generator of a clan var";
      }) files
      ++ map (
        credential:
        let
          declared = vars.${credential.generator};
        in
        {
          assertion =
            credential.generator == null || toString declared.script != "" || declared.prompts != { };
          message = "${setting credential.option}: ${machineName} has no generator ${toString credential.generator}. Declare clan.core.vars.generators.\"${toString credential.generator}\" with the file ${credential.file} in its configuration, or set source";
        }
      ) files
      ++ map (credential: {
        assertion =
          credential.generator == null
          || vars.${credential.generator}.files.${credential.file}.deploy;
        message = "${setting credential.option}: the file ${credential.file} of the generator ${toString credential.generator} has deploy = false, so that it is not on ${machineName}. Leave that out where the generator is declared, or name another file";
      }) all
      ++ map (credential: {
        assertion = lib.length (lib.filter (other: other.name == credential.name) all) == 1;
        message = "${setting credential.option}: two credentials would be ${credential.name} in the guest. Give one another name, with destination or oemCredentialName";
      }) all
      ++ lib.optionals hasMicrovm (
        map (
          string:
          let
            problem = oem.problem (oem.smbiosOf pkgs guest.microvm) string;
          in
          {
            assertion = problem == null;
            message = "${setting "staticOemStrings"}: ${string} ${toString problem}";
          }
        ) settings.staticOemStrings
      );

      clan.core.vars.generators = lib.mkMerge (
        # Whoever declares a generator need not know who uses it.
        map (
          credential:
          lib.mkIf (credential.generator != null) {
            ${toString credential.generator}.files.${credential.file}.restartUnits = [ provider ];
          }
        ) all
        ++ lib.mapAttrsToList (name: _: {
          ${generated name} = generator name ''
            openssl rand -base64 32 | tr -d '\n' > "$out"/${lib.escapeShellArg name}
          '' [ pkgs.openssl ];
        }) settings.runtimeSecrets
        ++ lib.optional (settings.rootPassword == true) {
          ${generated "root-password"} = lib.mkMerge [
            (generator "hash"
              ''
                openssl rand -base64 18 | tr -d '\n' > "$out"/password
                hash=$(mkpasswd -s -m yescrypt < "$out"/password)
                printf 'root:%s\n' "$hash" > "$out"/hash
              ''
              [
                pkgs.mkpasswd
                pkgs.openssl
              ]
            )
            {
              # For whoever logs in; the machine has no use for it.
              files.password.deploy = false;
            }
          ];
        }
      );
    }

    (lib.optionalAttrs hasMicrovm {
      microvm.vms.${vm} = {
        inherit (settings) autostart;
        evaluatedConfig = lib.mkIf isMachine self.nixosConfigurations.${settings.guest};
        # Also for a guest that is refused: without a configuration microvm.nix fails before that is said.
        config = lib.mkIf (!isMachine) {
          _file = place;
          imports = [
            (import ./vm.nix { inherit settings; })
          ]
          ++ map (module: {
            _file = setting "guestModules";
            imports = [ module ];
          }) (lib.filter lib.isAttrs settings.guestModules);
        };
      };

      services.guestagent.vms.${vm} = {
        # The names are whole: those of runtimeSecrets have no prefix.
        credentials = lib.listToAttrs (
          map (credential: {
            inherit (credential) name;
            value = {
              inherit (credential) required;
              source =
                if credential.generator == null then
                  credential.source
                else
                  vars.${credential.generator}.files.${credential.file}.path;
            };
          }) all
        );
        boot.credentials = settings.bootCredentials;
        inherit (settings) exposeOnCommandLine;
      };

      # The VMM runs as microvm: this is what a guest that broke out of it would find there.
      systemd.services = lib.mkIf settings.serviceHardening.enable {
        "microvm@${vm}".serviceConfig = lib.mapAttrs (_: lib.mkDefault) (
          {
            KeyringMode = "private";
            LimitCORE = 0;
            PrivateTmp = true;
            # crosvm's sandboxes read /proc/sys/kernel/cap_last_cap.
            ProcSubset =
              if settings.serviceHardening.procSubset != null then
                settings.serviceHardening.procSubset
              else if guest.microvm.hypervisor == "crosvm" then
                "all"
              else
                "pid";
            ProtectControlGroups = true;
            ProtectHome = true;
            ProtectProc = settings.serviceHardening.protectProc;
            ProtectSystem = "full";
          }
          # Each of these can take from a bridge's helper the capability that its file has: it is or brings NoNewPrivileges=,
          # or bounds the capabilities.
          // lib.optionalAttrs (!bridged) {
            CapabilityBoundingSet = "";
            LockPersonality = true;
            NoNewPrivileges = true;
            ProtectHostname = true;
            ProtectKernelLogs = true;
            ProtectKernelModules = true;
            ProtectKernelTunables = true;
            RestrictAddressFamilies = settings.serviceHardening.restrictAddressFamilies;
            RestrictRealtime = true;
            RestrictSUIDSGID = true;
            SystemCallArchitectures = "native";
          }
        );
      };
    })
  ];
}
