# A guest that the host neither calls nor hands anything to at boot.
{
  services.guestagent = {
    enable = true;
    smbios.enable = false;
    vsock.enable = false;
  };
}
