package vm_test

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/guestagent/guestagent/tests/vm"
	"github.com/guestagent/guestagent/tests/vm/internal/canary"
	"github.com/guestagent/guestagent/tests/vm/vmtest"
	"github.com/guestagent/guestagent/vsockrpc"
)

// A container is a NixOS host: it has the units that NixOS would have for testdata/nixos/host.nix, and the folders of its
// VMs as microvm.nix has them. What would be in the Nix store is below nixosTools. In nixosWire are the guests' ends of the
// VMs' sockets, in a folder for each.
const (
	nixosTools = "/usr/lib/guestagent-test/"
	nixosWire  = "/run/wire/"
	nixosGuest = "/run/shared/"

	needsWeb  = "needs-web.service"
	readyWeb  = "guestagent-ready@web.service"
	appOfWeb  = "app.service"
	decrypted = "/var/lib/sops/"

	plainVM     = "plain-vm.service"
	plainSocket = "/var/lib/vms/plain/vsock.sock"
)

func microvmOf(name string) string { return "microvm@" + name + ".service" }

// nixosConfig writes a configuration for a NixOS of that release, of modules, which are Nix, and settings.
func nixosConfig(t *testing.T, release vm.Release, modules string, settings ...string) string {
	t.Helper()
	dir, err := filepath.Abs("testdata/nixos")
	if err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(t.TempDir(), "config.nix")
	text := lines(slices.Concat([]string{
		"{ lib, pkgs, ... }:", "let dir = /. + \"" + dir + "\"; in", "{", "imports = " + modules + ";",
		`systemd.package = pkgs.systemd // { version = "` + strconv.Itoa(release.Systemd) + `"; };`,
	}, settings, []string{"}"})...)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return config
}

// script is a program of such a host.
func script(path string, text ...string) vm.File {
	return vm.File{Path: path, Mode: 0o755, Content: []byte(lines(append([]string{"#!/bin/sh", "set -eu"}, text...)...))}
}

// runner is what microvm.nix would have built for a VM.
func runner(name string, text ...string) []vm.File {
	bin := nixosTools + "runners/" + name + "/bin/"
	return []vm.File{script(bin+"microvm-run", text...), script(bin+"microvm-shutdown", `kill "$MAINPID"`)}
}

// standinRunner is the runner of a VM whose guest is a container. It removes sockets as the runners of its hypervisor do.
func standinRunner(name, sockets string) []vm.File {
	guest := nixosWire + name + "/guest_1021"
	return runner(name, "rm -f "+sockets+" "+guest, "exec "+standin+" vmm notify.vsock /run/way-"+name+".sock "+guest)
}

// nixosHost is such a host while it is tested.
type nixosHost struct {
	m       *vm.Machine
	release vm.Release
	wire    string // nixosWire on this machine
	// What the guests should have.
	db, key, fire, plain, box []byte
	values                    [][]byte
}

// newWire makes the folder that is nixosWire in a host.
func newWire(t *testing.T) string {
	t.Helper()
	wire := filepath.Dir(vmtest.VsockPath(t))
	// The VMMs' user makes sockets in the VMs' folders.
	for path, mode := range map[string]os.FileMode{"": 0o755, "web": 0o777, "fire": 0o777, "plain": 0o777} {
		path = filepath.Join(wire, path)
		if err := os.MkdirAll(path, mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil { // whatever the umask is
			t.Fatal(err)
		}
	}
	return wire
}

// startNixOSHost starts a host, whose VMs boot with it.
func startNixOSHost(t *testing.T, release vm.Release, wire string, runners ...vm.File) *nixosHost {
	t.Helper()
	h := &nixosHost{release: release, wire: wire}
	h.db, h.key, h.fire, h.plain, h.box = h.value(), h.value(), h.value(), h.value(), h.value()
	secret := func(path string, value []byte) vm.File { return vm.File{Path: path, Mode: 0o600, Content: value} }
	files := slices.Concat(
		withGuestctl(t, rendered(t, nixosConfig(t, release, "[ (dir + /host.nix) ]"))), runners,
		// What NixOS does before it starts anything.
		wanted("sysinit.target", "activation.service", lines(
			"[Unit]", "DefaultDependencies=no", "After=local-fs.target", "Before=sysinit.target", "[Service]", "Type=oneshot", "ExecStart="+nixosTools+"activate",
		)),
		[]vm.File{
			{Path: standin, Mode: 0o755, Source: vmtest.Binary(t, "github.com/guestagent/guestagent/tests/vm/standin")},
			secret(decrypted+"web-db", h.db), secret(hostSecrets+"web-key", h.key), secret(hostSecrets+"fire-db", h.fire),
			secret(hostSecrets+"plain-db", h.plain), secret(hostSecrets+"box-db", h.box),
			script(nixosTools+"activate",
				"getent group kvm >/dev/null || groupadd --system kvm", "groupadd --system guestagent", "useradd --system --gid kvm "+vmUser, "useradd --system --user-group vmm",
				"install -d -m 0775 -o "+vmUser+" -g kvm "+vmFolders, "install -d -o vmm -g vmm "+filepath.Dir(plainSocket),
				nixosTools+"install-secrets",
			),
			script(nixosTools+"install-microvm",
				"mkdir -p "+vmFolders+"$1", "cd "+vmFolders+"$1",
				"ln -sTf "+nixosTools+"runners/$1 current", "chown -h "+vmUser+":kvm . current",
			),
			// Its guest is nobody: what matters is what QEMU would be given.
			script(nixosTools+"runners/box/bin/microvm-run", "rm -f notify.vsock", "runtime_args=$(. /etc/guestagent-test/arguments/box)",
				`printf '%s\n' "$runtime_args" >arguments`, "exec sleep infinity"),
			script(nixosTools+"runners/box/bin/microvm-shutdown", `kill "$MAINPID"`),
			script(nixosTools+"plain-vm", "rm -f vsock.sock* "+nixosWire+"plain/guest_1021",
				"exec "+standin+" vmm vsock.sock /run/way-plain.sock "+nixosWire+"plain/guest_1021"),
			// As sops-nix has it outside a switch: another generation, the link to it, and the units of what changed.
			script(nixosTools+"install-secrets",
				"old=$(readlink /run/secrets || true)", "new=/run/secrets.d/$((${old##*/} + 1))", "units=",
				"install -d -m 0751 /run/secrets.d $new",
				"for file in "+decrypted+"*; do", "  name=${file##*/}", "  install -m 0400 $file $new/$name",
				`  [ -z "$old" ] || cmp -s $old/$name $new/$name || units="$units $(cat /etc/guestagent-test/restart/$name)"`, "done",
				"ln -sn $new /run/secrets.new", "mv -T /run/secrets.new /run/secrets", `[ -z "$old" ] || rm -r "$old"`,
				`[ -z "$units" ] || systemctl --no-block try-restart $units`,
			),
			// An agent takes local calls from root only, which no VMM is.
			{Path: unitDir + "way@.socket", Content: []byte(lines("[Socket]", "ListenStream=/run/way-%i.sock", "SocketMode=0666"))},
			{Path: unitDir + "way@.service", Content: []byte(lines("[Service]", "ExecStart=/usr/lib/systemd/systemd-socket-proxyd "+nixosWire+"%i/guest"))},
			{Path: unitDir + "sockets.target.wants/way@web.socket", Symlink: "../way@.socket"},
			{Path: unitDir + "sockets.target.wants/way@fire.socket", Symlink: "../way@.socket"},
			{Path: unitDir + "sockets.target.wants/way@plain.socket", Symlink: "../way@.socket"},
		},
	)
	h.m = vmtest.StartContainer(t, vm.ContainerConfig{
		Image: vmtest.Image(t, release), Overlay: files, Binds: map[string]string{filepath.Clean(nixosWire): h.wire}, WaitFor: vm.UntilGuest,
	})
	return h
}

// value makes one that nobody may see.
func (h *nixosHost) value() []byte {
	v := newValue()
	h.values = append(h.values, v)
	return v
}

// nixosGuestFiles are what the guest of a VM has: by its own configuration, and by what the host's module adds where
// microvm.nix runs it.
func nixosGuestFiles(t *testing.T, release vm.Release, name string, settings ...string) []vm.File {
	t.Helper()
	modules := fmt.Sprintf(`[ (dir + "/host-%s.nix") ]`, name)
	if name != "plain" {
		modules += fmt.Sprintf(` ++ import (dir + "/host-guest.nix") "%s"`, name)
	}
	return rendered(t, nixosConfig(t, release, modules, settings...))
}

// startGuest starts a container as a guest, and waits until it has booted.
func (h *nixosHost) startGuest(t *testing.T, name string) *vm.Machine {
	t.Helper()
	files := append(nixosGuestFiles(t, h.release, name, `services.guestagent.provider.address = lib.mkForce "unix:`+nixosGuest+`guest_1021";`),
		vm.File{Path: "/etc/systemd/system/guestagent-local.socket.d/shared.conf", Content: []byte(lines("[Socket]", "ListenStream="+nixosGuest+"guest"))})
	return vmtest.StartContainer(t, vm.ContainerConfig{
		Image: vmtest.Image(t, h.release), Overlay: files, Binds: map[string]string{filepath.Clean(nixosGuest): filepath.Join(h.wire, name)},
	})
}

// stamp is one of a unit's times on the host, in microseconds since its boot.
func (h *nixosHost) stamp(t *testing.T, unit, property string) uint64 {
	t.Helper()
	n, err := strconv.ParseUint(show(t, h.m, unit, property+"Monotonic"), 10, 64)
	if err != nil || n == 0 {
		t.Fatalf("%s of %s: %d, %v", property, unit, n, err)
	}
	return n
}

// wantFirst checks that the provider was there before its VMM was started.
func (h *nixosHost) wantFirst(t *testing.T, name string) {
	t.Helper()
	listened, started := h.stamp(t, providerOf(name), "ActiveEnterTimestamp"), h.stamp(t, microvmOf(name), "ExecMainStartTimestamp")
	if listened > started {
		t.Errorf("the provider of %s was there at %d, the VMM was started at %d", name, listened, started)
	}
}

// runs is which run of a VM it is: that of its unit, and its process.
func (h *nixosHost) runs(t *testing.T, name string) string {
	t.Helper()
	return fmt.Sprint(show(t, h.m, microvmOf(name), "InvocationID"), mainPID(t, h.m, microvmOf(name)))
}

// untilVMM waits until a VM's runner has come as far as to what it runs.
func (h *nixosHost) untilVMM(t *testing.T, name, program string) {
	t.Helper()
	until(t, "what runs "+name, program+"\n", func() string {
		return vmtest.Run(t, h.m, "cat", fmt.Sprintf("/proc/%d/comm", mainPID(t, h.m, microvmOf(name))))
	})
}

// untilBell waits until the guest can ring, and checks who else can.
func (h *nixosHost) untilBell(t *testing.T, name string) {
	t.Helper()
	h.untilVMM(t, name, filepath.Base(standin)) // it may remove the socket before
	untilBell(t, h.m, name)
	if got, want := vmtest.Run(t, h.m, "stat", "--format=%U %G %a %F", bellOf(name)), vmUser+" kvm 600 socket\n"; got != want {
		t.Errorf("the socket of %s is %q, want %q", name, got, want)
	}
}

// untilGiven waits until the service in web runs on what it should.
func (h *nixosHost) untilGiven(t *testing.T, web *vm.Machine) {
	t.Helper()
	app := []string{appOfWeb}
	eventually(t, "the service in web has its credentials", func() bool {
		return slices.Equal(given(t, web, "db", h.db, app...), app) && slices.Equal(given(t, web, "key", h.key, app...), app)
	})
}

// rotate changes the secret of sops-nix.
func (h *nixosHost) rotate(t *testing.T) {
	t.Helper()
	h.db = h.value()
	vmtest.WriteFile(t, h.m, decrypted+"web-db", 0o600, h.db)
	vmtest.Run(t, h.m, nixosTools+"install-secrets")
}

// wantNoneFailed checks that no unit has.
func (h *nixosHost) wantNoneFailed(t *testing.T) {
	t.Helper()
	if failed := vmtest.Run(t, h.m, "systemctl", "--failed", "--no-legend", "--plain"); failed != "" {
		t.Errorf("failed units:\n%s", failed)
	}
}

// asVMM returns a command that runs as the VMMs' user.
func asVMM(argv ...string) vm.Command {
	return vm.Command{Argv: append([]string{
		"setpriv", "--reuid=" + vmUser, "--regid=kvm", "--init-groups", "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs",
	}, argv...)}
}

// TestNixOSHost has what NixOS would run on a host with microvm.nix, the units that the module renders, with stand-ins for
// the VMMs and containers for the guests.
func TestNixOSHost(t *testing.T) {
	vmtest.Releases(t) // skips before anything is built
	vmtest.Each(t, func(t *testing.T, release vm.Release) {
		t.Parallel()
		h := startNixOSHost(t, release, newWire(t), slices.Concat(
			standinRunner("web", "notify.vsock notify.vsock_8888"), standinRunner("fire", "notify.vsock notify.vsock_*"),
		)...)
		web, fire, plain := h.startGuest(t, "web"), h.startGuest(t, "fire"), h.startGuest(t, "plain")
		for _, tt := range []struct {
			name string
			test func(*testing.T, *nixosHost, *vm.Machine, *vm.Machine)
		}{
			{"boot", testNixOSBoot},
			{"two VMs", testNixOSTwo},
			{"secret of sops-nix", testNixOSSops},
			{"secret in a file", testNixOSFile},
			{"VM restarted", testNixOSRestart},
			{"VMM killed", testNixOSKill},
			{"sockets removed", testNixOSSockets},
			{"VM stopped", testNixOSStop},
			{"secret missing", testNixOSMissing},
			{"secret that may be missing", testNixOSLate},
			{"strings at boot", testNixOSStrings},
			{"VMM's user", testNixOSUser},
			{"exporter", testNixOSExporter},
			{"units", testNixOSUnits},
		} {
			if !t.Run(tt.name, func(t *testing.T) { tt.test(t, h, web, fire) }) {
				return // each builds on those before
			}
		}
		t.Run("without microvm.nix", func(t *testing.T) { testNixOSPlain(t, h, plain) })
	})
}

func testNixOSBoot(t *testing.T, h *nixosHost, web, fire *vm.Machine) {
	if state, err := h.m.WaitReady(t.Context()); err != nil || state != "running" {
		t.Errorf("the host is %s, %v", state, err)
	}
	for _, name := range []string{"web", "fire"} {
		untilState(t, h.m, "active", microvmOf(name), providerOf(name))
		h.wantFirst(t, name)
		h.untilBell(t, name)
		untilHost(t, h.m, name, vsockrpc.GuestInForce)
		if got := show(t, h.m, microvmOf(name), "Wants"); !slices.Contains(strings.Fields(got), providerOf(name)) {
			t.Errorf("%s wants %q, not its provider", microvmOf(name), got)
		}
	}
	untilState(t, h.m, "active", readyWeb, needsWeb)
	h.untilGiven(t, web)
	wantFile(t, fire, "/run/credstore/db", h.fire)
	if got := show(t, web, appOfWeb, "NRestarts"); got != "0" {
		t.Errorf("the service in web was restarted %s times", got)
	}
}

func testNixOSTwo(t *testing.T, h *nixosHost, web, fire *vm.Machine) {
	for name, want := range map[string]struct {
		m     *vm.Machine
		names string
	}{"web": {web, "db key"}, "fire": {fire, "db"}} {
		if got := strings.Join(strings.Fields(vmtest.Run(t, want.m, "ls", "/run/credstore")), " "); got != want.names {
			t.Errorf("%s has %q, want %q", name, got, want.names)
		}
		folder := fmt.Sprintf("/proc/%d/root/run/credentials/", mainPID(t, h.m, providerOf(name)))
		if got := strings.Fields(vmtest.Run(t, h.m, "ls", "-A", folder)); !slices.Equal(got, []string{providerOf(name)}) {
			t.Errorf("the provider of %s sees %q, want its own", name, got)
		}
	}
}

// wantRotated checks that what act changes comes to web, and to nobody else, while the VMs run on.
func wantRotated(t *testing.T, h *nixosHost, web, fire *vm.Machine, act func()) {
	t.Helper()
	runs, others, app := h.runs(t, "web"), h.runs(t, "fire"), show(t, web, appOfWeb, "InvocationID")
	g, _ := generationOf(t, web)
	gFire, labels := generationOf(t, fire)
	act()
	h.untilGiven(t, web)
	untilHost(t, h.m, "web", vsockrpc.GuestInForce)
	if now, _ := generationOf(t, web); now != g+1 {
		t.Errorf("the generation of web is %d, want %d", now, g+1)
	}
	if now := show(t, web, appOfWeb, "InvocationID"); now == app {
		t.Error("the service in web is the one before")
	}
	if got := h.runs(t, "web"); got != runs {
		t.Errorf("the VM web is run %s, and was %s", got, runs)
	}
	if got := h.runs(t, "fire"); got != others {
		t.Errorf("the VM fire is run %s, and was %s", got, others)
	}
	if now, after := generationOf(t, fire); now != gFire || fmt.Sprint(after) != fmt.Sprint(labels) {
		t.Errorf("fire has generation %d, labels %v, want %d, %v", now, after, gFire, labels)
	}
	wantActive(t, h.m, needsWeb, "active")
}

func testNixOSSops(t *testing.T, h *nixosHost, web, fire *vm.Machine) {
	other := show(t, h.m, providerOf("fire"), "InvocationID")
	for range 2 {
		wantRotated(t, h, web, fire, func() { h.rotate(t) })
	}
	if got := show(t, h.m, providerOf("fire"), "InvocationID"); got != other {
		t.Error("the provider of fire was restarted")
	}
}

func testNixOSFile(t *testing.T, h *nixosHost, web, fire *vm.Machine) {
	const file = hostSecrets + "web-key"
	provider := show(t, h.m, providerOf("web"), "InvocationID")
	// Another file in its place, and another value in the file.
	wantRotated(t, h, web, fire, func() {
		h.key = h.value()
		vmtest.WriteFile(t, h.m, file, 0o600, h.key)
	})
	wantRotated(t, h, web, fire, func() {
		h.key = h.value()
		res := vmtest.Exec(t, h.m, vm.Command{Argv: []string{"sh", "-c", "cat >" + file}, Stdin: h.key})
		if res.ExitCode != 0 {
			t.Errorf("writing %s: %s", file, res.Stderr)
		}
	})
	// A reload brings new credentials from systemd 260 on.
	if got := show(t, h.m, providerOf("web"), "InvocationID"); (got == provider) != (h.release.Systemd >= 260) {
		t.Errorf("the provider is run %s, and was %s", got, provider)
	}
}

func testNixOSRestart(t *testing.T, h *nixosHost, web, _ *vm.Machine) {
	g, labels := generationOf(t, web)
	runs, before := h.runs(t, "web"), showAll(t, h.m, "InvocationID", providerOf("web"), readyWeb, needsWeb)
	vmtest.Run(t, h.m, "systemctl", "restart", microvmOf("web"))
	h.wantFirst(t, "web")
	h.untilBell(t, "web")
	untilState(t, h.m, "active", readyWeb, needsWeb)
	untilHost(t, h.m, "web", vsockrpc.GuestInForce)
	if h.runs(t, "web") == runs {
		t.Error("the VM was not restarted")
	}
	for i, id := range showAll(t, h.m, "InvocationID", providerOf("web"), readyWeb, needsWeb) {
		if id == before[i] {
			t.Errorf("%s was not started anew with the VM", []string{providerOf("web"), readyWeb, needsWeb}[i])
		}
	}
	h.untilGiven(t, web)
	if now, after := generationOf(t, web); now != g || fmt.Sprint(after) != fmt.Sprint(labels) {
		t.Errorf("generation %d, labels %v, want %d, %v", now, after, g, labels)
	}
}

func testNixOSKill(t *testing.T, h *nixosHost, web, _ *vm.Machine) {
	runs := h.runs(t, "web")
	vmtest.Run(t, h.m, "systemctl", "kill", "--signal=KILL", microvmOf("web"))
	eventually(t, "systemd has started the VM again", func() bool { return show(t, h.m, microvmOf("web"), "NRestarts") == "1" })
	untilState(t, h.m, "active", microvmOf("web"), providerOf("web"))
	if h.runs(t, "web") == runs {
		t.Error("the VMM is the one before")
	}
	h.untilBell(t, "web")
	wantRung(t, web)
	h.rotate(t)
	h.untilGiven(t, web)
}

// wantRung checks that a ring in the guest is answered.
func wantRung(t *testing.T, guest *vm.Machine) {
	t.Helper()
	eventually(t, "the guest's ring is answered", func() bool {
		res := vmtest.Exec(t, guest, vm.Command{Argv: []string{"guestagent", "pull"}})
		return res.ExitCode == 0
	})
}

// testNixOSSockets has a runner that removes whatever is beside its socket.
func testNixOSSockets(t *testing.T, h *nixosHost, _, fire *vm.Machine) {
	since := cursor(t, h.m)
	for range 3 {
		vmtest.Run(t, h.m, "systemctl", "restart", microvmOf("fire"))
		h.wantFirst(t, "fire")
		h.untilBell(t, "fire")
		wantRung(t, fire)
	}
	// So does a runner that starts again by itself.
	vmtest.Run(t, h.m, "systemctl", "kill", "--signal=KILL", microvmOf("fire"))
	eventually(t, "systemd has started the VM again", func() bool { return show(t, h.m, microvmOf("fire"), "NRestarts") == "1" })
	untilState(t, h.m, "active", microvmOf("fire"), providerOf("fire"))
	h.untilBell(t, "fire")
	wantRung(t, fire)
	wantFile(t, fire, "/run/credstore/db", h.fire)
	untilHost(t, h.m, "fire", vsockrpc.GuestInForce)
	if got := journalOf(t, h.m, providerOf("fire"), since); strings.Contains(got, "level=ERROR") {
		t.Errorf("the provider says\n%s", got)
	}
}

func testNixOSStop(t *testing.T, h *nixosHost, web, fire *vm.Machine) {
	vmtest.Run(t, h.m, "systemctl", "stop", microvmOf("web"))
	untilState(t, h.m, "inactive", microvmOf("web"), providerOf("web"), readyWeb, needsWeb)
	if vmm, provider := h.stamp(t, microvmOf("web"), "InactiveEnterTimestamp"), h.stamp(t, providerOf("web"), "ActiveExitTimestamp"); provider < vmm {
		t.Errorf("the provider was stopped at %d, the VM had ended at %d", provider, vmm)
	}
	wantNoFile(t, h.m, bellOf("web"))
	wantActive(t, h.m, providerOf("fire"), "active")

	// A secret that changes meanwhile starts nothing, and is there with the VM.
	h.rotate(t)
	h.key = h.value()
	const passesOn = "guestagent-sources@web.service"
	before := show(t, h.m, passesOn, "InvocationID")
	vmtest.WriteFile(t, h.m, hostSecrets+"web-key", 0o600, h.key)
	eventually(t, "the change was seen", func() bool { return show(t, h.m, passesOn, "InvocationID") != before })
	untilState(t, h.m, "inactive", passesOn)
	for _, unit := range []string{microvmOf("web"), providerOf("web"), readyWeb} {
		wantActive(t, h.m, unit, "inactive")
	}
	start(t, h.m, microvmOf("web"))
	h.wantFirst(t, "web")
	h.untilGiven(t, web)
	start(t, h.m, needsWeb)
	wantActive(t, h.m, readyWeb, "active")

	// A switch may start the provider of a VM that is off, and that alone.
	vmtest.Run(t, h.m, "systemctl", "stop", microvmOf("fire"))
	untilState(t, h.m, "inactive", providerOf("fire"))
	start(t, h.m, providerOf("fire"))
	wantActive(t, h.m, microvmOf("fire"), "inactive")
	start(t, h.m, microvmOf("fire"))
	wantRung(t, fire)

	// A VM's folder that was removed is made again before its provider starts.
	vmtest.Run(t, h.m, "systemctl", "stop", microvmOf("fire"))
	untilState(t, h.m, "inactive", providerOf("fire")) // nobody waits for that
	vmtest.Run(t, h.m, "rm", "-r", vmFolders+"fire")
	start(t, h.m, "install-microvm-fire.service", microvmOf("fire"))
	h.untilBell(t, "fire")
	wantRung(t, fire)
	if got := show(t, h.m, providerOf("fire"), "NRestarts"); got != "0" {
		t.Errorf("the provider was restarted %s times", got)
	}
}

// testNixOSMissing starts a VM before its secrets are there. It comes up, and is given them as soon as they are.
func testNixOSMissing(t *testing.T, h *nixosHost, web, _ *vm.Machine) {
	vmtest.Run(t, h.m, "systemctl", "stop", microvmOf("web"))
	untilState(t, h.m, "inactive", providerOf("web")) // nobody waits for that
	h.key = h.value()
	vmtest.Run(t, h.m, "rm", hostSecrets+"web-key")
	start(t, h.m, microvmOf("web"))
	begin(t, h.m, needsWeb)
	wantActive(t, h.m, providerOf("web"), "activating")
	runs := h.runs(t, "web")
	vmtest.WriteFile(t, h.m, hostSecrets+"web-key", 0o600, h.key)
	untilState(t, h.m, "active", providerOf("web"), readyWeb, needsWeb)
	h.untilGiven(t, web)
	if got := h.runs(t, "web"); got != runs {
		t.Errorf("the VM web is run %s, and was %s", got, runs)
	}
}

// testNixOSLate has a secret come and go.
func testNixOSLate(t *testing.T, h *nixosHost, _, fire *vm.Machine) {
	const file, cred = hostSecrets + "fire-late", "/run/credstore/late"
	runs := h.runs(t, "fire")
	wantNoFile(t, fire, cred)
	for range 2 {
		late := h.value()
		vmtest.WriteFile(t, h.m, file, 0o600, late)
		eventually(t, "the guest has it", func() bool {
			b, err := fire.ReadFile(t.Context(), cred)
			return err == nil && bytes.Equal(b, late)
		})
	}
	// Two that change at once: the second may do so while systemd does not watch, since it passes on the first.
	for range 4 {
		late := h.value()
		h.fire = h.value()
		vmtest.WriteFile(t, h.m, file, 0o600, late)
		vmtest.WriteFile(t, h.m, hostSecrets+"fire-db", 0o600, h.fire)
		eventually(t, "the guest has both", func() bool {
			b, err := fire.ReadFile(t.Context(), cred)
			db, dbErr := fire.ReadFile(t.Context(), "/run/credstore/db")
			return err == nil && dbErr == nil && bytes.Equal(b, late) && bytes.Equal(db, h.fire)
		})
	}
	vmtest.Run(t, h.m, "rm", file)
	eventually(t, "the guest has it no longer", func() bool {
		return vmtest.Exec(t, fire, vm.Command{Argv: []string{"test", "-e", cred}}).ExitCode != 0
	})
	wantFile(t, fire, "/run/credstore/db", h.fire)
	if got := h.runs(t, "fire"); got != runs {
		t.Errorf("the VM fire is run %s, and was %s", got, runs)
	}
}

// testNixOSStrings has a VM whose credentials are also in files for QEMU, which the VM's own unit makes.
func testNixOSStrings(t *testing.T, h *nixosHost, _, _ *vm.Machine) {
	want := []string{"io.guestagent.provider:vsock:2:1021", "io.guestagent.credential:db=" + string(h.box)}
	for range 2 {
		untilState(t, h.m, "active", microvmOf("box"), providerOf("box"))
		var got []string
		h.untilVMM(t, "box", "sleep")
		for argument := range strings.FieldsSeq(vmtest.Run(t, h.m, "cat", vmFolders+"box/arguments")) {
			if public, ok := strings.CutPrefix(argument, "type=11,value="); ok {
				got = append(got, public)
			}
			path, ok := strings.CutPrefix(argument, "type=11,path=")
			if !ok {
				continue
			}
			got = append(got, string(vmtest.ReadFile(t, h.m, path)))
			wantDenied(t, h.m, "nobody", asNobody("head", "--bytes=1", path))
			if owner := vmtest.Run(t, h.m, "stat", "--format=%U %a", path); owner != vmUser+" 600\n" {
				t.Errorf("%s is %q, want it to be the VMM's", path, owner)
			}
		}
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("%d strings are not the %d that are wanted", len(got), len(want))
		}
		vmtest.Run(t, h.m, "systemctl", "restart", microvmOf("box"))
	}
}

// testNixOSPlain has a VM whose unit the host's module did not make.
func testNixOSPlain(t *testing.T, h *nixosHost, plain *vm.Machine) {
	const provider = "guestagent-provide@plain.service"
	untilState(t, h.m, "active", plainVM, provider)
	if listened, started := h.stamp(t, provider, "ActiveEnterTimestamp"), h.stamp(t, plainVM, "ExecMainStartTimestamp"); listened > started {
		t.Errorf("the provider was there at %d, the VMM was started at %d", listened, started)
	}
	if got := vmtest.Run(t, h.m, "stat", "--format=%U %G %a", plainSocket+"_1021"); got != "vmm vmm 600\n" {
		t.Errorf("the socket is %q, want it to be vmm's", got)
	}
	wantFile(t, plain, "/run/credstore/db", h.plain)
	run := show(t, h.m, plainVM, "InvocationID")
	h.plain = h.value()
	vmtest.WriteFile(t, h.m, hostSecrets+"plain-db", 0o600, h.plain)
	eventually(t, "the guest has the value", func() bool {
		b, err := plain.ReadFile(t.Context(), "/run/credstore/db")
		return err == nil && bytes.Equal(b, h.plain)
	})
	if got := show(t, h.m, plainVM, "InvocationID"); got != run {
		t.Error("the VM was restarted")
	}
	vmtest.Run(t, h.m, "systemctl", "stop", plainVM)
	untilState(t, h.m, "inactive", plainVM, provider)
	if vmm, provider := h.stamp(t, plainVM, "InactiveEnterTimestamp"), h.stamp(t, provider, "ActiveExitTimestamp"); provider < vmm {
		t.Errorf("the provider was stopped at %d, the VM had ended at %d", provider, vmm)
	}
	h.wantNoneFailed(t)
}

func testNixOSUser(t *testing.T, h *nixosHost, _, _ *vm.Machine) {
	for name, cred := range map[string]string{"web": "/db", "fire": "/fire.db"} {
		proc := fmt.Sprintf("/proc/%d/", mainPID(t, h.m, providerOf(name)))
		dir := "/run/credentials/" + providerOf(name)
		for _, file := range []string{dir + cred, proc + "environ", proc + "mem", proc + "maps", proc + "root" + dir + cred, "/run/guestagent/provide/labels/" + name + "/labels.json"} {
			vmtest.Run(t, h.m, "test", "-e", file)
			wantDenied(t, h.m, vmUser, asVMM("head", "--bytes=1", file))
		}
		for _, folder := range []string{dir, proc + "root/", proc + "cwd/", proc + "fd", "/run/guestagent/provide/labels/" + name} {
			vmtest.Run(t, h.m, "test", "-e", folder)
			wantDenied(t, h.m, vmUser, asVMM("ls", folder))
		}
		wantDenied(t, h.m, vmUser, asVMM(standin, "call", statusOf(name), statusCall))
	}
	for _, file := range []string{hostSecrets + "fire-db", "/run/secrets/web-db"} {
		wantDenied(t, h.m, vmUser, asVMM("head", "--bytes=1", file))
	}
	// Nor from where the VMM's own process is.
	wantDenied(t, h.m, vmUser, asVMM("head", "--bytes=1", fmt.Sprintf("/proc/%d/root/run/credentials/%s/db", mainPID(t, h.m, microvmOf("web")), providerOf("web"))))
}

func testNixOSExporter(t *testing.T, h *nixosHost, _, _ *vm.Machine) {
	eventually(t, "the guests are shown", func() bool {
		metrics := scrapeIn(t, h.m, "/metrics")
		for _, name := range []string{"web", "fire"} {
			if !strings.Contains(metrics, `guestagent_provider_state{state="inForce",vm="`+name+`"} 1`) ||
				!strings.Contains(metrics, `guestagent_credential_state{credential="db",state="inForce",vm="`+name+`"} 1`) {
				return false
			}
		}
		return true
	})
	untilState(t, h.m, "active", exporterUnit)
}

func testNixOSUnits(t *testing.T, h *nixosHost, _, _ *vm.Machine) {
	h.wantNoneFailed(t)
	vmtest.Run(t, h.m, "systemctl", "daemon-reload") // it complains again, where it is heard
	for _, unit := range []string{providerOf("web"), providerOf("fire"), readyWeb, exporterUnit} {
		exposure(t, h.m, unit, 2.5)
	}
	var forms [][]byte
	for _, v := range h.values {
		forms = append(forms, canary.Forms(v)...)
	}
	journal, err := h.m.Journal(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	// systemd has no objection to what it was given.
	for line := range strings.Lines(string(journal)) {
		if strings.Contains(line, "/etc/systemd/system/") {
			t.Errorf("the journal has %q", line)
		}
	}
	boot := vmtest.Exec(t, h.m, vm.Command{Argv: []string{"systemd-analyze", "verify", "--man=no", "default.target"}})
	if strings.Contains(string(boot.Stderr), "ordering cycle") {
		t.Errorf("systemd-analyze verify: %s", boot.Stderr)
	}
	untilState(t, h.m, "active", "sysinit.target", "paths.target", "basic.target", "multi-user.target")
	for what, b := range map[string][]byte{
		"the journal":     journal,
		"a process":       []byte(vmtest.Run(t, h.m, "sh", "-c", "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null || true")),
		"a unit":          []byte(vmtest.Run(t, h.m, "systemctl", "show", "--all", "*")),
		"/etc":            []byte(vmtest.Run(t, h.m, "sh", "-c", "find /etc -type f -exec cat {} +")),
		"the VMs' folder": []byte(vmtest.Run(t, h.m, "sh", "-c", "find "+filepath.Clean(vmFolders)+" -type f -exec cat {} +")),
	} {
		if n, err := canary.Scan(bytes.NewReader(b), forms); n >= 0 || err != nil {
			t.Errorf("%s has a value at %d, %v", what, n, err)
		}
	}
}

// leash is how a test runs the VM of a unit: whoever connects wants it to run.
type leash struct {
	l     *net.UnixListener
	conn  net.Conn
	guest *vm.Machine
}

func newLeash(t *testing.T, path string) *leash {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	return &leash{l: l}
}

// wanted waits until the VM is to run.
func (l *leash) wanted(t *testing.T) {
	t.Helper()
	if err := l.l.SetDeadline(time.Now().Add(waitLimit)); err != nil {
		t.Fatal(err)
	}
	conn, err := l.l.Accept()
	if err != nil {
		t.Fatalf("waiting until the VM is to run: %v", err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	l.conn = conn
}

// ended waits until the VM is to run no longer, and ends it.
func (l *leash) ended(t *testing.T) {
	t.Helper()
	if err := l.conn.SetDeadline(time.Now().Add(waitLimit)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, l.conn); err != nil {
		t.Fatalf("waiting until the VM is to end: %v", err)
	}
	if err := l.guest.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestNixOSHostVM is such a host whose VM web is a virtual machine, behind the socket where cloud-hypervisor would have it.
// Both ends are what NixOS would run. The VMM on the host is a stand-in, and the machine runs while that does.
func TestNixOSHostVM(t *testing.T) {
	vmtest.Releases(t) // skips before anything is built
	vmtest.Each(t, func(t *testing.T, release vm.Release) {
		guest, vmm := nixosWire+"web/guest", []string{"rm -f notify.vsock notify.vsock_8888 " + nixosWire + "web/guest_*"}
		cfg := vm.Config{Image: vmtest.Image(t, release), Overlay: nixosGuestFiles(t, release, "web")}
		if release.Systemd >= 255 {
			cfg.OEMStrings = vm.OEM("io.systemd.credential:vmm.notify_socket=vsock-stream:2:8888")
		} else {
			vmm = append(vmm, "systemd-notify --ready") // the guest's PID 1 does not
		}
		vmm = append(vmm, "exec "+standin+" relay notify.vsock /run/way-web.sock "+guest+" "+nixosWire+"web/leash")
		wire := newWire(t)
		cfg.Vsock = &vm.VsockConfig{Path: filepath.Join(wire, "web/guest")}
		l := newLeash(t, filepath.Join(wire, "web/leash"))
		h := startNixOSHost(t, release, wire, append(runner("web", vmm...), standinRunner("fire", "notify.vsock notify.vsock_*")...)...)
		boot := func() {
			l.wanted(t)
			// The provider waits for the VM, and not for its unit, which is there when the guest says so.
			wantActive(t, h.m, providerOf("web"), "active")
			h.wantFirst(t, "web")
			h.untilBell(t, "web")
			if release.Systemd >= 255 {
				wantActive(t, h.m, microvmOf("web"), "activating")
			}
			l.guest = vmtest.Boot(t, cfg)
			untilState(t, h.m, "active", microvmOf("web"), readyWeb, needsWeb)
			untilState(t, l.guest, "active", appOfWeb)
			h.untilGiven(t, l.guest)
			if got := show(t, l.guest, appOfWeb, "NRestarts"); got != "0" {
				t.Errorf("the service was restarted %s times", got)
			}
		}
		boot()
		runs, first := h.runs(t, "web"), guestReport(t, l.guest)

		h.rotate(t)
		h.untilGiven(t, l.guest)
		h.key = h.value()
		vmtest.WriteFile(t, h.m, hostSecrets+"web-key", 0o600, h.key)
		h.untilGiven(t, l.guest)
		if now := guestReport(t, l.guest); now.BootID != first.BootID || now.Generation != first.Generation+2 {
			t.Errorf("the guest is %+v, want two generations more than %+v", now, first)
		}
		if got := h.runs(t, "web"); got != runs {
			t.Errorf("the VM is run %s, and was %s", got, runs)
		}

		vmtest.Run(t, h.m, "systemctl", "restart", "--no-block", microvmOf("web"))
		l.ended(t)
		boot()
		if now := guestReport(t, l.guest); now.BootID == first.BootID {
			t.Error("the guest has not booted again")
		}

		vmtest.Run(t, h.m, "systemctl", "stop", microvmOf("web"))
		l.ended(t)
		untilState(t, h.m, "inactive", microvmOf("web"), providerOf("web"), readyWeb, needsWeb)
		wantNoFile(t, h.m, bellOf("web"))
		h.wantNoneFailed(t)
	})
}
