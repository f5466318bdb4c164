# A host of VMs, as its user would write it: plain has a unit of the user's own, the others are microvm.nix's.
{
  imports = [
    ./host-microvm.nix
    ./host-sops.nix
  ];

  microvm.vms.web.config = ./host-web.nix;
  microvm.vms.fire.config = ./host-fire.nix;
  microvm.vms.box.config = {
    microvm.hypervisor = "qemu";
    microvm.qemu.machine = "q35";
    microvm.vsock.cid = 5;
  };

  sops.secrets.web-db = { };

  services.guestagent.vms.web = {
    credentials.db.sops = "web-db";
    credentials.key.source = "/root/secrets/web-key";
    refresh = "auto";
  };
  services.guestagent.vms.fire = {
    credentialPrefix = "fire.";
    credentials.db.source = "/root/secrets/fire-db";
    # It may come later.
    credentials.late = {
      source = "/root/secrets/fire-late";
      required = false;
    };
  };
  # QEMU with vhost-device-vsock.
  services.guestagent.vms.box = {
    socket = "/var/lib/microvms/box/notify.vsock";
    credentials.db.source = "/root/secrets/box-db";
    boot.strings = [ "io.guestagent.provider:vsock:2:1021" ];
    boot.credentials = true;
  };
  services.guestagent.vms.plain = {
    hypervisor = "cloud-hypervisor";
    socket = "/var/lib/vms/plain/vsock.sock";
    unit = "plain-vm.service";
    credentials.value = {
      source = "/root/secrets/plain-db";
      destination = "db";
    };
  };
  services.guestagent.exporter.enable = true;

  systemd.services.plain-vm = {
    wantedBy = [ "multi-user.target" ];
    serviceConfig = {
      Type = "notify";
      User = "vmm";
      WorkingDirectory = "/var/lib/vms/plain";
      ExecStart = "/usr/lib/guestagent-test/plain-vm";
    };
  };

  # It comes after a guest that works.
  systemd.services.needs-web = {
    wantedBy = [ "multi-user.target" ];
    requires = [ "guestagent-ready@web.service" ];
    after = [ "guestagent-ready@web.service" ];
    serviceConfig = {
      Type = "exec";
      ExecStart = "/usr/bin/sleep infinity";
    };
  };
}
