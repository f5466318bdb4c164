# The guest plain of host.nix, of which the host's module knows nothing.
{
  services.guestagent = {
    enable = true;
    peer.privilegedPort = "ignored";
    credentials.db = { };
  };
}
