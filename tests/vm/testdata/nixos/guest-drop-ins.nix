# A guest with every drop-in that is not for everybody.
{
  services.guestagent = {
    enable = true;
    provider.holdBoot = true;
    settings.consumers.compare = true;
  };
}
