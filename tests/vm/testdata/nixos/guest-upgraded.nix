# guest-consumers.nix, later.
{
  imports = [ ./guest-consumers.nix ];
  services.guestagent.credentials.later.restartUnits = [ "pooler.service" ];
}
