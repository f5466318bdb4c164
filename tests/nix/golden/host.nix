# A host with microvm.nix: a VM behind a Unix socket with secrets of sops-nix's, one with vhost-vsock and files, and one that
# another unit runs.
{
  imports = [ ../sops-nix.nix ];

  microvm.vms.web.config = {
    microvm.hypervisor = "cloud-hypervisor";
    microvm.vsock.cid = 3;
    services.guestagent.credentials.db-password.services = [ "app" ];
  };
  microvm.vms.db.config = {
    microvm.hypervisor = "qemu";
    microvm.vsock.cid = 4;
    services.guestagent.credentials.key = { };
  };

  sops.secrets.web-db = { };
  services.guestagent = {
    vms.web = {
      credentials.db-password.sops = "web-db";
      credentials.api-key = {
        source = "/etc/secrets/api-key";
        required = false;
      };
      refresh = "auto";
      gate = "1m";
    };
    vms.db = {
      credentialPrefix = "db.";
      credentials.key.source = "/etc/secrets/key";
    };
    vms.other = {
      hypervisor = "crosvm";
      cid = 5;
      unit = "crosvm-other.service";
      credentials.key.source = "/etc/secrets/key";
    };
    exporter.enable = true;
  };
}
