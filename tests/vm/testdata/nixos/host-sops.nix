# What a host has of sops-nix: the options that matter, and which units are restarted when a secret changes, for the
# program that installs the secrets, /usr/lib/guestagent-test/install-secrets.
{ config, lib, ... }:
{
  imports = [ ../../../nix/sops-nix.nix ];
  config.environment.etc = lib.mapAttrs' (
    name: secret:
    lib.nameValuePair "guestagent-test/restart/${name}" {
      text = lib.concatStringsSep "\n" secret.restartUnits;
    }
  ) config.sops.secrets;
}
