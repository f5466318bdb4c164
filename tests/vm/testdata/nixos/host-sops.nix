# What a host has of sops-nix: the options that matter, and which units are restarted when a secret changes, for the
# program that installs the secrets, /usr/lib/guestagent-test/install-secrets.
{ config, lib, ... }:
{
  options.sops.secrets = lib.mkOption {
    type = lib.types.attrsOf (
      lib.types.submodule (
        { name, ... }:
        {
          options.path = lib.mkOption {
            type = lib.types.str;
            default = "/run/secrets/${name}";
          };
          options.restartUnits = lib.mkOption {
            type = lib.types.listOf lib.types.str;
            default = [ ];
          };
        }
      )
    );
    default = { };
  };
  config.environment.etc = lib.mapAttrs' (
    name: secret:
    lib.nameValuePair "guestagent-test/restart/${name}" {
      text = lib.concatStringsSep "\n" secret.restartUnits;
    }
  ) config.sops.secrets;
}
