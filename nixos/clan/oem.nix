# Public OEM strings with a credential in each, and how a VM is given them.
{ lib }:
let
  # io.systemd.credential[.binary]:NAME=VALUE
  parts = builtins.match "io\\.systemd\\.credential(\\.binary)?:([^=:]+)=(.*)";
in
{
  # The name of the VMM that hands over SMBIOS strings, or null: the machine that is microvm.nix' default in QEMU has no
  # SMBIOS.
  smbiosOf =
    pkgs: microvm:
    if !pkgs.stdenv.hostPlatform.isx86_64 then
      null
    else if
      microvm.hypervisor == "cloud-hypervisor"
      ||
        microvm.hypervisor == "qemu"
        && lib.any (machine: lib.hasPrefix machine microvm.qemu.machine) [
          "pc"
          "q35"
        ]
    then
      microvm.hypervisor
    else
      null;

  # What is wrong with a string for a VM whose smbiosOf is that, or null.
  problem =
    smbios: string:
    if parts string == null then
      "is no credential. Write io.systemd.credential:NAME=VALUE"
    else if smbios == null && builtins.match "[A-Za-z0-9_.:=,+/@%~-]*" string == null then
      "has a character that is not passed on on a kernel command line, and this VM has no SMBIOS. Write io.systemd.credential.binary:NAME=BASE64"
    else if smbios == "cloud-hypervisor" && builtins.match "[^],\"[]*" string == null then
      "has a comma, a quote or a bracket, which cloud-hypervisor cannot pass on. Write io.systemd.credential.binary:NAME=BASE64"
    else
      null;

  kernelParam =
    string:
    let
      p = parts string;
    in
    "systemd.set_credential${
      lib.optionalString (lib.elemAt p 0 != null) "_binary"
    }=${lib.elemAt p 1}:${lib.elemAt p 2}";
}
