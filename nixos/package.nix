# The agent, with its units. Called as pkgs.callPackage ./package.nix { }.
{
  lib,
  buildGoModule,
}:

buildGoModule (finalAttrs: {
  pname = "guestagent";
  version = "0.1.0-dev";

  # What the program is built from and nothing else, so that a change to a test or a page rebuilds no guest.
  src = lib.fileset.toSource {
    root = ../.;
    fileset = lib.fileset.unions [
      ../cmd
      ../consumer
      ../credsocket
      ../credstore
      ../go.mod
      ../go.sum
      ../health
      ../internal
      ../smbios
      ../systemd
      ../vsockrpc
    ];
  };

  # tests/nix/check --update writes it anew after a change of go.mod.
  vendorHash = "sha256-NWbwB4QnJQpLZHld6T7vvjt2/wZUxzoTnZv+2r3B/ZE=";

  subPackages = [ "cmd/guestagent" ];
  env.CGO_ENABLED = 0;
  ldflags = [
    "-s"
    "-w"
    "-X main.version=${finalAttrs.version}"
  ];

  # `make test` runs the tests. Most need a kernel, a file system or a VM that a build sandbox does not have.
  doCheck = false;

  # The units of systemd/ as they are, but for the one path that NixOS does not have.
  postInstall = ''
    install -D -m 444 -t "$out/lib/systemd/system" systemd/*.mount systemd/*.service systemd/*.socket systemd/*.target
    substituteInPlace "$out"/lib/systemd/system/*.service \
      --replace-fail /usr/bin/guestagent "$out/bin/guestagent"
    install -D -m 444 -t "$out/share/guestagent" systemd/optional/*.conf
  '';

  meta = {
    description = "Gets secrets from the host into a running VM's systemd credentials";
    homepage = "https://github.com/guestagent/guestagent";
    license = lib.licenses.asl20;
    mainProgram = "guestagent";
    platforms = lib.platforms.linux;
  };
})
