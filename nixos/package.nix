# The agent, with its units. Called as pkgs.callPackage ./package.nix { }.
{
  lib,
  buildGoModule,
}:

import ./program.nix { inherit lib buildGoModule; } "guestagent" {
  files = [
    (lib.fileset.difference ../systemd ../systemd/host)
  ];

  # The units of systemd/ as they are, but for the one path that NixOS does not have.
  postInstall = ''
    install -D -m 444 -t "$out/lib/systemd/system" systemd/*.*
    substituteInPlace "$out"/lib/systemd/system/*.service \
      --replace-fail /usr/bin/guestagent "$out/bin/guestagent"
    install -D -m 444 -t "$out/share/guestagent" systemd/optional/*.conf
  '';

  meta.description = "Gets secrets from the host into a running VM's systemd credentials";
}
