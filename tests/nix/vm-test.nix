# A NixOS guest that boots with a credential, has it changed while it runs, and is switched to another configuration. Not run
# where the project is developed, which has no Nix store and no nixpkgs: `nix flake check` runs it.
{
  name = "guestagent";

  nodes.guest =
    {
      config,
      lib,
      pkgs,
      ...
    }:
    {
      imports = [ ../../nixos/module.nix ];

      virtualisation.qemu.options = [ "-smbios type=11,value=io.guestagent.credential:api-key=first" ];
      # The VM of the test has no vsock: the host is its own root, on the local socket.
      services.guestagent = {
        enable = true;
        vsock.enable = false;
        credentials.api-key = {
          services = [ "consumer" ];
          onChange = "restart";
        };
      };
      systemd.services.consumer = {
        wantedBy = [ "multi-user.target" ];
        serviceConfig = {
          ExecStart = "${lib.getExe' pkgs.coreutils "sleep"} infinity";
          DynamicUser = true;
        };
      };
      environment.etc.api-key.source = config.services.guestagent.credentials.api-key.path;
      environment.systemPackages = [ (pkgs.callPackage ../../nixos/guestctl.nix { }) ];

      system.switch.enable = true;
      # It changes the agent's configuration and the consumer.
      specialisation.other.configuration = {
        services.guestagent.settings.previous.ttl = 60;
        systemd.services.consumer.environment.OTHER = "1";
      };
    };

  testScript = ''
    agent = "unix:/run/guestagent/varlink.sock"


    def consumer_has(value):
        guest.wait_for_unit("consumer.service")
        guest.succeed(f"grep -qx {value} /etc/api-key")


    guest.wait_for_unit("multi-user.target")
    guest.succeed("mountpoint /run/credstore")

    with subtest("a credential from SMBIOS is there at boot"):
        consumer_has("first")
        guest.succeed(f"guestctl list {agent} | grep api-key")

    with subtest("a change reaches the service"):
        guest.succeed(f"printf second | guestctl push {agent} api-key:-")
        consumer_has("second")

    with subtest("a switch drops no value"):
        guest.succeed("/run/booted-system/specialisation/other/bin/switch-to-configuration test")
        guest.succeed("mountpoint /run/credstore")
        consumer_has("second")
        guest.succeed(f"guestctl list {agent} | grep api-key")

    with subtest("nothing has failed"):
        guest.fail("systemctl list-units --failed --no-legend | grep .")
  '';
}
