# The test-vm of docs/clan.md.
{
  # An instance of the inventory.
  instance = {
    module.name = "microvm";
    module.input = "guestagent";
    roles.server = {
      machines.britton-desktop.settings = {
        vmName = "test-vm";
        autostart = true;

        vcpu = 2;
        mem = 1024;

        hypervisor = "cloud-hypervisor";
        interfaces = [
          {
            type = "tap";
            id = "vm-test";
            mac = "02:00:00:01:01:01";
          }
        ];

        vsockCid = 3;

        credentials = {
          api-key = {
            generator = "test-vm-secrets";
            destination = "API-KEY";
          };
          db-password = {
            generator = "test-vm-secrets";
            destination = "DB-PASSWORD";
          };
          jwt-secret = {
            generator = "test-vm-secrets";
            destination = "JWT-SECRET";
          };
        };

        staticOemStrings = [
          "io.systemd.credential:ENVIRONMENT=test"
          "io.systemd.credential:CLUSTER=britton-desktop"
        ];

        serviceHardening = {
          enable = true;
          protectProc = "invisible";
          procSubset = "pid";
          restrictAddressFamilies = [
            "AF_UNIX"
            "AF_VSOCK"
            "AF_INET"
            "AF_INET6"
          ];
        };

        rootPassword = true;
        enableSsh = true;
      };
      extraModules = [
        {
          microvm.vms.test-vm.extraModules = [
            (
              { pkgs, ... }:
              {
                environment.systemPackages = [ pkgs.hello ];
              }
            )
          ];
        }
      ];
    };
  };

  # What stays in the machine's configuration.
  machine =
    { pkgs, ... }:
    {
      clan.core.vars.generators.test-vm-secrets = {
        files = {
          "api-key" = {
            secret = true;
            mode = "0400";
          };
          "db-password" = {
            secret = true;
            mode = "0400";
          };
          "jwt-secret" = {
            secret = true;
            mode = "0400";
          };
        };
        runtimeInputs = [ pkgs.openssl ];
        script = ''
          for name in api-key db-password jwt-secret; do
            openssl rand -base64 32 | tr -d '\n' > "$out/$name"
          done
        '';
      };
    };
}
