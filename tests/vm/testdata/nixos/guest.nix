# The guest of most tests: it has the agent, and no provider to ask.
{
  services.guestagent = {
    enable = true;
    provider.address = null;
  };
}
