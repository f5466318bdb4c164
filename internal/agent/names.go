package agent

import "strings"

// deniedPrefixes begin the names on which systemd itself acts
// (systemd.system-credentials(7)). One that is pushed is more than a secret: a
// tmpfiles.extra writes files as root, an ssh.authorized_keys.root logs in.
// SMBIOS may bring them, as it may for PID 1; while the guest runs nobody sets
// them unless the configuration says so.
var deniedPrefixes = []string{
	"cryptenroll.", "cryptsetup.", "firstboot.", "fsck.", "fstab.", "getty.", "home.", "import.", "io.systemd.", "journal.", "login.", "network.",
	"passwd.", "quotacheck.", "shell.", "ssh.", "sysctl.", "system.", "systemd.", "sysusers.", "tmpfiles.", "udev.", "userdb.", "vconsole.", "veritysetup.", "vmm.",
}

// nameDenied reports whether the host may not set name.
func nameDenied(name string, allow []string) bool {
	for _, a := range allow {
		prefix, glob := strings.CutSuffix(a, "*")
		if name == a || glob && strings.HasPrefix(name, prefix) {
			return false
		}
	}
	for _, p := range deniedPrefixes {
		if strings.HasPrefix(name, p) {
			return true
		}
	}
	return false
}
