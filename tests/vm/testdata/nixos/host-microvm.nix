# What a host has of microvm.nix: the units that run the VMs of microvm.vms, less those for networks and devices. The
# runner of a VM, which microvm.nix would build, is in /usr/lib/guestagent-test/runners/NAME, and what it takes further
# arguments from in /etc/guestagent-test/arguments/NAME.
{ config, lib, ... }:
let
  names = lib.attrNames config.microvm.vms;
  guest = name: config.microvm.vms.${name}.config.config.microvm;
  folder = "/var/lib/microvms/%i";
  before = [ "microvm@%i.service" ];
  partOf = [ "microvm@%i.service" ];
  templates = {
    # Where nothing is shared, there is no program for it, and the condition fails.
    "microvm-virtiofsd@" = {
      inherit before partOf;
      after = [
        "local-fs.target"
        "microvm-set-booted@%i.service"
      ];
      unitConfig.ConditionPathExists = "${folder}/current/bin/virtiofsd-run";
      restartIfChanged = false;
      serviceConfig = {
        Type = "notify";
        WorkingDirectory = folder;
        ExecStart = "${folder}/current/bin/virtiofsd-run";
        Restart = "always";
        RestartSec = "5s";
      };
    };
    "microvm-set-booted@" = {
      inherit before partOf;
      restartIfChanged = false;
      serviceConfig = {
        Type = "oneshot";
        RemainAfterExit = true;
        WorkingDirectory = folder;
        User = "microvm";
        Group = "kvm";
        ExecStart = "/bin/sh -ec 'rm -f booted; ln -s $$(readlink current) booted'";
        ExecStop = "/bin/rm booted";
      };
    };
    "microvm@" = {
      requires = [
        "microvm-virtiofsd@%i.service"
        "microvm-set-booted@%i.service"
      ];
      after = [
        "network.target"
        "systemd-modules-load.service"
        "microvm-virtiofsd@%i.service"
        "microvm-set-booted@%i.service"
      ];
      unitConfig.ConditionPathExists = "${folder}/current/bin/microvm-run";
      restartIfChanged = false;
      serviceConfig = {
        Type = "simple";
        WorkingDirectory = folder;
        ExecStart = "${folder}/current/bin/microvm-run";
        ExecStop = "${folder}/booted/bin/microvm-shutdown";
        # A VM that is emulated takes its time.
        TimeoutSec = 600;
        Restart = "always";
        RestartSec = "5s";
        User = "microvm";
        Group = "kvm";
        SyslogIdentifier = "microvm@%i";
        LimitNOFILE = 1048576;
        NotifyAccess = "all";
        LimitMEMLOCK = "infinity";
      };
    };
  };
  ofVM = name: {
    "install-microvm-${name}" = {
      before = map (unit: "${unit}@${name}.service") [
        "microvm"
        "microvm-virtiofsd"
        "microvm-set-booted"
      ];
      partOf = [ "microvm@${name}.service" ];
      wantedBy = [ "microvms.target" ];
      serviceConfig = {
        Type = "oneshot";
        ExecStart = "/usr/lib/guestagent-test/install-microvm ${name}";
      };
    };
    "microvm@${name}" = {
      overrideStrategy = "asDropin";
      path = lib.mkForce [ ];
      serviceConfig = {
        X-RestartIfChanged = [
          ""
          true
        ];
        # What the VM says is said to systemd, when it is cloud-hypervisor's.
        Type = if (guest name).hypervisor == "cloud-hypervisor" then "notify" else "simple";
      };
    };
    "microvm-virtiofsd@${name}" = {
      overrideStrategy = "asDropin";
      path = lib.mkForce [ ];
      serviceConfig.X-RestartIfChanged = [
        ""
        true
      ];
    };
  };
in
{
  systemd.services = lib.foldl' (all: name: all // ofVM name) templates names;
  systemd.targets.microvms = {
    wantedBy = [ "multi-user.target" ];
    wants = map (name: "microvm@${name}.service") names;
  };
  environment.etc = lib.listToAttrs (
    map (name: {
      name = "guestagent-test/arguments/${name}";
      value.text = (guest name).extraArgsScript;
    }) (lib.filter (name: (guest name).extraArgsScript != null) names)
  );
}
