# A guest with consumers of every kind. Each has what it was given open as its standard input.
{ config, pkgs, ... }:
let
  inherit (config.services.guestagent) credentials;
  bash = "${pkgs.bash}/bin/bash";
  wanted = settings: {
    wantedBy = [ "multi-user.target" ];
    serviceConfig = {
      Type = "exec";
    }
    // settings;
  };
  reads = path: wanted { ExecStart = "${bash} -c 'exec sleep infinity <${path}'"; };
in
{
  services.guestagent = {
    enable = true;
    provider.address = null;
    credentials = {
      web-key.services = [ "web" ];
      # For two, under a name of its own.
      database = {
        name = "db.password";
        services = [
          "left"
          "right.service"
        ];
        onChange = "auto";
      };
      certificate = {
        services = [ "proxy" ];
        onChange = "reload";
      };
      pushed = {
        via = "socket";
        services = [
          "waits"
          "waits-simple"
        ];
        onChange = "restart";
      };
      maybe = {
        required = false;
        services = [ "lenient" ];
      };
      pool = {
        restartUnits = [ "pooler.service" ];
        reloadUnits = [ "reloader.service" ];
      };
    };
  };

  systemd.services = {
    web = wanted {
      # It is not root, and nobody chose an owner for it.
      DynamicUser = true;
      ExecStart = "${bash} -c 'exec sleep infinity <${credentials.web-key.path}'";
    };
    left = reads credentials.database.pathFor.left;
    right = reads credentials.database.pathFor."right.service";
    proxy = wanted {
      ExecStart = "${bash} -c 'exec sleep infinity <${credentials.certificate.path}'";
      ExecReload = "${pkgs.coreutils}/bin/cp ${credentials.certificate.path} /run/reloaded-proxy";
    };
    waits = reads credentials.pushed.pathFor.waits;
    waits-simple = wanted {
      Type = "simple";
      ExecStart = "${bash} -c 'exec sleep infinity <${credentials.pushed.pathFor.waits-simple}'";
    };
    lenient = wanted {
      ExecStart = "${bash} -c 'test ! -e ${credentials.maybe.path} || exec sleep infinity <${credentials.maybe.path}; exec sleep infinity'";
    };
    pooler = wanted { ExecStart = "${pkgs.coreutils}/bin/sleep infinity"; };
    reloader = wanted {
      ExecStart = "${pkgs.coreutils}/bin/sleep infinity";
      ExecReload = "${pkgs.coreutils}/bin/touch /run/reloaded-reloader";
    };
  };
}
