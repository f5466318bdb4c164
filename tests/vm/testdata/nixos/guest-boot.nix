# A guest whose boot needs credentials early.
{ config, pkgs, ... }:
let
  inherit (config.services.guestagent) credentials;
  bash = "${pkgs.bash}/bin/bash";
  # What sops-nix sets with sops.useSystemdActivation and sops.age.keyFile = ageKey. It keeps the key that it found.
  ageKey = "/run/credstore/age-key";
  sops = seen: {
    unitConfig = {
      DefaultDependencies = "no";
      RequiresMountsFor = [ ageKey ];
    };
    serviceConfig = {
      Type = "oneshot";
      ExecStart = [ "${pkgs.coreutils}/bin/install -D -m 0600 ${ageKey} /run/seen/${seen}" ];
      RemainAfterExit = true;
    };
  };
in
{
  services.guestagent = {
    enable = true;
    provider.address = null;
    credentials = {
      ssh-host-key.services = [ "sshd" ];
      root-password.services = [ "root-password" ];
    };
  };

  systemd.services = {
    sops-install-secrets = sops "age-key" // {
      wantedBy = [ "sysinit.target" ];
      after = [
        "local-fs.target"
        "systemd-sysusers.service"
        "userborn.service"
      ];
      requiredBy = [ "sysinit-reactivation.target" ];
      before = [ "sysinit-reactivation.target" ];
    };
    sops-install-secrets-for-users = sops "age-key-for-users" // {
      wantedBy = [ "systemd-sysusers.service" ];
      before = [ "systemd-sysusers.service" ];
    };
    # No more of sshd than what matters here: it reads its host key as root, at its start.
    sshd = {
      wantedBy = [ "multi-user.target" ];
      after = [ "network.target" ];
      serviceConfig = {
        Type = "exec";
        ExecStart = "${bash} -c 'exec sleep infinity <${credentials.ssh-host-key.path}'";
      };
    };
    # The credential is a line of chpasswd's: root:HASH.
    root-password = {
      wantedBy = [ "multi-user.target" ];
      before = [
        "getty.target"
        "sshd.service"
      ];
      path = [ pkgs.shadow ];
      serviceConfig = {
        Type = "oneshot";
        RemainAfterExit = true;
        ExecStart = "${bash} -c 'exec chpasswd -e <${credentials.root-password.path}'";
      };
    };
  };
}
