package vm_test

import (
	"strings"
	"testing"

	"github.com/guestagent/guestagent/tests/vm"
	"github.com/guestagent/guestagent/tests/vm/vmtest"
	"github.com/guestagent/guestagent/vsockrpc"
)

// Two containers are a host and its guest. What a VMM would have in between is in a folder that both see.
const (
	readyUnit   = "guestagent-ready@web.service"
	readyApp    = "app.service"
	readyVMM    = "vmm@web.service"
	readyShared = "/run/shared"
	readyGo     = "/run/go"
)

// readyGuest is a guest whose boot waits for a file, and which has a provider.
func readyGuest(t *testing.T) []vm.File {
	t.Helper()
	return append(append(agentFiles(t), wanted("multi-user.target", "held.service", lines(
		"[Service]", "Type=oneshot", "TimeoutStartSec=infinity", "ExecStart=/bin/sh -c 'until test -e "+readyGo+"; do sleep 0.05; done'",
	))...),
		vm.File{Path: agentConfig, Content: []byte(`{"provider": {"address": "unix:` + readyShared + `/device.sock", "timeout": 1}}`)},
		vm.File{Path: "/etc/systemd/system/guestagent-local.socket.d/shared.conf", Content: []byte(lines("[Socket]", "ListenStream="+readyShared+"/agent.sock"))},
	)
}

// readyHost is its host, with a unit that needs the guest.
func readyHost(t *testing.T) []vm.File {
	t.Helper()
	socket := vmFolders + "%i/notify.vsock"
	file := func(name string, text ...string) vm.File {
		return vm.File{Path: unitDir + name, Content: []byte(lines(text...))}
	}
	return []vm.File{
		{Path: "/usr/bin/guestctl", Mode: 0o755, Source: vmtest.Binary(t, "github.com/guestagent/guestagent/cmd/guestctl")},
		{Path: standin, Mode: 0o755, Source: vmtest.Binary(t, "github.com/guestagent/guestagent/tests/vm/standin")},
		{Path: unitDir + "guestagent-ready@.service", Source: "../../systemd/host/guestagent-ready@.service"},
		{Path: unitDir + "guestagent-provide@.service", Source: "../../systemd/host/guestagent-provide@.service"},
		{Path: "/etc/guestagent/vms.d/web.json", Content: []byte(`{"target": "vsock-mux:` + vmFolders + `web/notify.vsock"}`)},
		{Path: hostSecrets + "web-db", Mode: 0o600, Content: newValue()},
		{Path: vmFolders + "web", Dir: true},
		file("vmm@.service", "[Service]", "Type=notify", "ExecStartPre=/bin/rm -f "+socket+" "+readyShared+"/device.sock",
			"ExecStart="+standin+" vmm "+socket+" "+readyShared+"/agent.sock "+readyShared+"/device.sock"),
		file(providerOf("web")+".d/vm.conf", "[Service]", "LoadCredential=db:"+hostSecrets+"web-db", "ReadWritePaths="+vmFolders+"web"),
		// As the unit says, for another VMM.
		file(readyUnit+".d/vm.conf", "[Unit]", "PartOf=vmm@%i.service", "After=vmm@%i.service"),
		file(readyApp, "[Unit]", "Requires="+readyUnit, "After="+readyUnit, "[Service]", "Type=exec", "ExecStart=/usr/bin/sleep infinity"),
	}
}

// TestReady has a unit on a host come after a guest that works.
func TestReady(t *testing.T) {
	vmtest.Releases(t) // skips before anything is built
	hostFiles, guestFiles := readyHost(t), readyGuest(t)
	vmtest.Each(t, func(t *testing.T, release vm.Release) {
		t.Parallel()
		image, binds := vmtest.Image(t, release), map[string]string{readyShared: t.TempDir()}
		h := vmtest.StartContainer(t, vm.ContainerConfig{Image: image, Overlay: hostFiles, Binds: binds})
		// waits checks that the unit does not start, and is not refused.
		waits := func() {
			t.Helper()
			untilState(t, h, "activating", readyUnit)
			wantActive(t, h, readyApp, "inactive")
		}
		// says waits until the host sees the guest so.
		says := func(verdict string) {
			t.Helper()
			until(t, "the guest's verdict", verdict, func() string {
				s, err := decodeSight(string(vmtest.Exec(t, h, vm.Command{Argv: []string{"guestctl", "status", "--json", "web"}}).Stdout))
				if err != nil {
					t.Fatal(err)
				}
				return s.Verdict
			})
		}
		// heard waits until whoever waits is connected: its output is two sockets, too.
		heard := func() {
			t.Helper()
			eventually(t, "the guest is watched", func() bool {
				fds := vmtest.Exec(t, h, vm.Command{Argv: []string{"ls", "-l", "/proc/" + show(t, h, readyUnit, "MainPID") + "/fd"}})
				return strings.Count(string(fds.Stdout), "socket:") > 2
			})
		}

		begin(t, h, readyApp)
		says("unreachable")
		waits()
		start(t, h, readyVMM) // it has no guest yet
		says("unreachable")
		waits()

		g := vmtest.StartContainer(t, vm.ContainerConfig{Image: image, Overlay: guestFiles, Binds: binds, WaitFor: vm.UntilGuest})
		says(vsockrpc.VerdictStarting)
		heard()
		waits()
		vmtest.Run(t, g, "touch", readyGo)
		if _, err := g.WaitReady(t.Context()); err != nil {
			t.Fatal(err)
		}
		// It has booted, without the credentials that it should have.
		says(vsockrpc.VerdictFailing)
		heard()
		waits()
		start(t, h, providerOf("web"))
		untilState(t, h, "active", readyUnit, readyApp)
		says(vsockrpc.VerdictHealthy)

		// A VM that is stopped is waited for again.
		vmtest.Run(t, h, "systemctl", "stop", readyVMM)
		untilState(t, h, "inactive", readyUnit, readyApp)
		begin(t, h, readyApp)
		waits()
		start(t, h, readyVMM)
		untilState(t, h, "active", readyUnit, readyApp)

		// One that is restarted, too, and who needs it is restarted with it.
		before := showAll(t, h, "InvocationID", readyUnit, readyApp)
		vmtest.Run(t, h, "systemctl", "restart", readyVMM)
		untilState(t, h, "active", readyUnit, readyApp)
		for i, id := range showAll(t, h, "InvocationID", readyUnit, readyApp) {
			if id == before[i] {
				t.Errorf("%s was not started anew with the VM", []string{readyUnit, readyApp}[i])
			}
		}
		if failed := vmtest.Run(t, h, "systemctl", "--failed", "--no-legend", "--plain"); failed != "" {
			t.Errorf("failed units:\n%s", failed)
		}
		exposure(t, h, readyUnit, 2.5)
	})
}
