# The host's tool, with its units. Called as pkgs.callPackage ./guestctl.nix { }.
{
  lib,
  buildGoModule,
  stdenv,
}:

import ./program.nix { inherit lib buildGoModule; } "guestctl" {
  files = [
    ../dist/prometheus/alerts.yml
    ../systemd/host
  ];

  # As `make install-guestctl` does. The program writes its man pages and completions itself: where the machine that builds
  # it cannot run it, there are none.
  postInstall = ''
    install -D -m 444 -t "$out/lib/systemd/system" systemd/host/*.*
    substituteInPlace "$out"/lib/systemd/system/*.service \
      --replace-fail /usr/bin/guestctl "$out/bin/guestctl"
    install -D -m 444 -t "$out/share/guestctl" dist/prometheus/alerts.yml
    mkdir -p "$out/lib/systemd/varlink-bridges"
    for name in vsock vsock-mux; do
      ln -s ../../../bin/guestctl "$out/lib/systemd/varlink-bridges/$name"
    done
  ''
  + lib.optionalString (stdenv.buildPlatform.canExecute stdenv.hostPlatform) ''
    mkdir -p "$out/share/man/man1"
    "$out/bin/guestctl" man "$out/share/man/man1"
    "$out/bin/guestctl" completion bash | install -D -m 444 /dev/stdin "$out/share/bash-completion/completions/guestctl"
    "$out/bin/guestctl" completion zsh | install -D -m 444 /dev/stdin "$out/share/zsh/site-functions/_guestctl"
    "$out/bin/guestctl" completion fish | install -D -m 444 /dev/stdin "$out/share/fish/vendor_completions.d/guestctl.fish"
  '';

  meta.description = "Changes systemd credentials in running VMs, hands them over at boot, and tells how the VMs are";
}
