# The guest web of host.nix, with a service that loads its credentials.
{
  microvm.hypervisor = "cloud-hypervisor";
  microvm.vsock.cid = 3;

  services.guestagent.credentials.db.services = [ "app" ];
  services.guestagent.credentials.key.services = [ "app" ];

  systemd.services.app = {
    wantedBy = [ "multi-user.target" ];
    serviceConfig = {
      Type = "exec";
      ExecStart = "/usr/bin/sleep infinity";
    };
  };
}
