# The guest fire of host.nix, with a credential that nobody loads.
{
  microvm.hypervisor = "firecracker";
  microvm.vsock.cid = 4;

  services.guestagent.credentials.db = { };
}
