# A guest that the host calls at another port.
{
  services.guestagent = {
    enable = true;
    provider.address = null;
    vsock.port = 1023;
  };
}
