# Not run where this is developed: it takes nixpkgs, clan-core and KVM. A VM test in clan's manner: a server that runs test-vm
# inside of it, and hands it a secret that clan has generated. In a flake with clan-core and microvm.nix:
#
#   clan.nixosTests.microvm = {
#     imports = [ (import ./nixos/clan/tests/vm { microvm = inputs.microvm; }) ];
#     clan.modules.microvm = ./nixos/clan;
#   };
#
# It needs test vars first, which clan-core's generate-test-vars writes.
{ microvm }:
{
  name = "microvm";

  clan = {
    directory = ./.;
    inventory = {
      machines.server = { };

      instances.test-vm = {
        module.name = "microvm";
        module.input = "self";
        roles.server.machines.server.settings = {
          vsockCid = 3;
          runtimeSecrets.api-key.oemCredentialName = "API_KEY";
        };
        roles.server.extraModules = [
          {
            imports = [ microvm.nixosModules.host ];
            microvm.vms.test-vm.extraModules = [
              (
                { pkgs, ... }:
                {
                  services.guestagent.credentials.API_KEY.services = [ "consumer" ];
                  systemd.services.consumer = {
                    wantedBy = [ "multi-user.target" ];
                    serviceConfig.ExecStart = "${pkgs.coreutils}/bin/sleep infinity";
                  };
                }
              )
            ];
          }
        ];
      };
    };
  };

  nodes.server.virtualisation = {
    cores = 2;
    memorySize = 4096;
    qemu.options = [ "-cpu host" ];
  };

  testScript = ''
    start_all()
    server.wait_for_unit("microvm@test-vm.service")
    server.wait_for_unit("guestagent-provide@test-vm.service")
    server.succeed("guestctl wait test-vm --for ready --timeout 10m")
    server.succeed("guestctl list test-vm | grep API_KEY")
    # No value on a command line
    secret = server.succeed("cat /run/credentials/guestagent-provide@test-vm.service/API_KEY").strip()
    # A process may end meanwhile.
    assert secret not in server.succeed("(cat /proc/[0-9]*/cmdline || true) | tr '\\0' ' '")
    server.succeed("systemctl cat microvm@test-vm | grep NoNewPrivileges=true")

    with subtest("the provider goes, and the VM stays"):
        server.succeed("systemctl stop guestagent-provide@test-vm")
        server.succeed("systemctl is-active microvm@test-vm")
  '';
}
