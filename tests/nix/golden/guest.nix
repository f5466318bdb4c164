# A guest with consumers of every kind, and the settings that bring drop-ins with them.
{ pkgs, ... }:
{
  services.guestagent = {
    enable = true;
    vsock.port = 1000;
    peer.privilegedPort = "ignored";
    provider = {
      timeout = 60;
      holdBoot = true;
    };
    credentials = {
      # Each service finds it at a path of its own.
      db-password = {
        services = [
          "web"
          "worker@1"
        ];
        onChange = "auto";
        restartUnits = [ "pgbouncer.service" ];
      };
      api-key = {
        required = false;
        services = [ "web.service" ];
      };
      # The attribute is not its name.
      signing = {
        name = "signing-key";
        via = "socket";
        services = [ "signer" ];
        onChange = "reload";
      };
    };
    health = {
      ignoreUnits = [ "nightly-*.service" ];
      disk.degraded = 80;
    };
    settings = {
      consumers.compare = true;
      policy.load."db-*" = [ "web.service" ];
    };
  };

  systemd.services = {
    web = {
      wantedBy = [ "multi-user.target" ];
      serviceConfig.ExecStart = "${pkgs.coreutils}/bin/sleep infinity";
    };
    "worker@".serviceConfig.ExecStart = "${pkgs.coreutils}/bin/sleep infinity";
    "worker@1".wantedBy = [ "multi-user.target" ];
    signer.serviceConfig = {
      ExecStartPre = "${pkgs.coreutils}/bin/true";
      ExecStart = "${pkgs.coreutils}/bin/sleep infinity";
    };
  };
}
