# How the project's programs are built: the agent by package.nix, the host's tool by guestctl.nix.
{
  lib,
  buildGoModule,
}:

let
  inherit (lib) fileset;

  # What each program is built from and nothing else, so that a change to a test, a page or the other program rebuilds no
  # guest.
  folders = {
    guestagent = [
      ../cmd/guestagent
      ../consumer
      ../credsocket
      ../credstore
      ../health
      ../internal/agent
      ../internal/credential
      ../internal/secret
      ../smbios
      ../vsockrpc
    ];
    guestctl = [
      ../cmd/guestctl
      ../internal/credential
      ../internal/host
      ../internal/secret
      ../smbios
      ../vsockrpc
    ];
  };
  # Only tests import these.
  testPackages = [
    ../internal/agent/agenttest
    ../internal/host/hosttest
  ];
  isCode =
    file: file.hasExt "go" && !(lib.hasSuffix "_test.go" file.name) || file.hasExt "varlink";
  source =
    folders: others:
    let
      modules = [
        ../go.mod
        ../go.sum
      ];
      code = fileset.difference (fileset.unions (map (fileset.fileFilter isCode) folders)) (
        fileset.unions testPackages
      );
    in
    fileset.toSource {
      root = ../.;
      fileset = fileset.unions (modules ++ [ code ] ++ others);
    };
in
pname:
{
  # What postInstall takes from the sources.
  files,
  postInstall,
  meta,
}:
buildGoModule (finalAttrs: {
  inherit pname postInstall;
  version = "0.1.0-dev";

  src = source folders.${pname} files;

  # The modules of both programs, so that there is one hash; `make vendor-hash` writes it anew after a change of go.mod.
  vendorHash = "sha256-XnsfeLgJ1lbSfRsDyQHZ0biaD0/DAoUTZXewoudLguw=";
  overrideModAttrs = _: {
    name = "guestagent-${finalAttrs.version}-go-modules";
    src = source (lib.concatLists (lib.attrValues folders)) [ ];
  };

  subPackages = [ "cmd/${pname}" ];
  env.CGO_ENABLED = 0;
  ldflags = [
    "-s"
    "-w"
    "-X main.version=${finalAttrs.version}"
  ];

  # `make test` runs the tests. Most need a kernel, a file system or a VM that a build sandbox does not have.
  doCheck = false;

  meta = {
    homepage = "https://github.com/guestagent/guestagent";
    license = lib.licenses.asl20;
    mainProgram = pname;
    platforms = lib.platforms.linux;
  }
  // meta;
})
