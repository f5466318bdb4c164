# What the settings say of the VM itself, as a NixOS module of its guest.
{ settings }:
{
  config,
  lib,
  options,
  pkgs,
  ...
}:
let
  oem = import ./oem.nix { inherit lib; };
  smbios = oem.smbiosOf pkgs config.microvm;
  # Those with a fault are refused on the host.
  strings = lib.filter (string: oem.problem smbios string == null) settings.staticOemStrings;

  set = lib.filterAttrs (_: value: value != null && value != { });
in
{
  # Elsewhere the machine's role is refused.
  config = lib.optionalAttrs (options ? microvm.vsock) (
    lib.mkMerge [
      {
        microvm = set { inherit (settings) hypervisor mem vcpu; } // {
          interfaces = map (
            interface: set (interface // { macvtap = set interface.macvtap; })
          ) settings.interfaces;
          vsock = set { cid = settings.vsockCid; };
          cloud-hypervisor.platformOEMStrings = lib.mkIf (smbios == "cloud-hypervisor") strings;
          qemu.extraArgs = lib.mkIf (smbios == "qemu") (
            lib.concatMap (string: [
              "-smbios"
              # QEMU's way to write a comma
              "type=11,value=${lib.replaceStrings [ "," ] [ ",," ] string}"
            ]) strings
          );
        };
        boot.kernelParams = lib.mkIf (smbios == null) (map oem.kernelParam strings);
      }

      (lib.mkIf settings.enableSsh {
        services.openssh.enable = true;
        # systemd listens on vsock port 22 wherever there is an sshd. This asks for a CID.
        microvm.vsock.ssh.enable = lib.mkDefault true;
      })

      # A text is refused on the host.
      (lib.mkIf (settings.rootPassword == true) {
        services.guestagent.credentials.root-password = {
          services = [ "root-password" ];
          onChange = "restart";
        };
        systemd.services.root-password = {
          description = "Set Root's Password";
          wantedBy = [ "multi-user.target" ];
          serviceConfig = {
            Type = "oneshot";
            RemainAfterExit = true;
            # The credential is a line as chpasswd takes it. Without a hash behind the colon, root would need no password.
            ExecStart = "/bin/sh -c 'IFS=: read -r name hash <\"$CREDENTIALS_DIRECTORY\"/root-password; test -n \"$hash\" && exec ${pkgs.shadow}/bin/chpasswd -e <\"$CREDENTIALS_DIRECTORY\"/root-password'";
          };
        };
      })
    ]
  );
}
