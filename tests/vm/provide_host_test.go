package vm_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/guestagent/guestagent/tests/vm"
	"github.com/guestagent/guestagent/tests/vm/internal/canary"
	"github.com/guestagent/guestagent/tests/vm/vmtest"
	"github.com/guestagent/guestagent/vsockrpc"
)

// A container is a host with two VMs, and what runs in them: the agent as it is everywhere, and a second one with a root of
// its own. Between them are stand-ins for a VMM, which run as a user without any privilege.
const (
	standin     = "/usr/lib/guestagent-test/standin"
	vmUser      = "microvm"
	vmFolders   = "/var/lib/microvms/"
	hostSecrets = "/root/secrets/"
	otherRoot   = "/run/guests/other"
	otherAgent  = "other-agent.service"
	watcher     = "watcher"
	watchers    = "watchers"

	ringCall   = `{"method":"io.guestagent.Provider.Ring"}`
	statusCall = `{"method":"io.guestagent.Provider.Status"}`
)

func providerOf(name string) string { return "guestagent-provide@" + name + ".service" }
func vmmOf(name string) string      { return "standin@" + name + ".service" }
func bellOf(name string) string     { return vmFolders + name + "/notify.vsock_1021" }
func deviceOf(name string) string   { return "/run/standin-" + name + "/device.sock" }
func statusOf(name string) string   { return "/run/guestagent/provide/" + name + ".sock" }

// dropIn is that of a VM's provider.
func dropIn(t *testing.T, m *vm.Machine, name, file string, settings ...string) {
	t.Helper()
	content := lines(append([]string{"[Service]"}, settings...)...)
	vmtest.WriteFile(t, m, "/etc/systemd/system/"+providerOf(name)+".d/"+file, 0o644, []byte(content))
	vmtest.Run(t, m, "systemctl", "daemon-reload")
}

// hostFiles are what such a host has besides its image.
func hostFiles(t *testing.T) []vm.File {
	t.Helper()
	vmFile := func(name string) vm.File {
		return vm.File{
			Path:    "/etc/guestagent/vms.d/" + name + ".json",
			Content: fmt.Appendf(nil, `{"target": "vsock-mux:%s%s/notify.vsock"}`, vmFolders, name),
		}
	}
	unit := func(name string, settings ...string) vm.File {
		return vm.File{Path: unitDir + name, Content: []byte(lines(settings...))}
	}
	return append(agentFiles(t),
		vm.File{Path: standin, Mode: 0o755, Source: vmtest.Binary(t, "github.com/guestagent/guestagent/tests/vm/standin")},
		vm.File{Path: unitDir + "guestagent-provide@.service", Source: "../../systemd/host/guestagent-provide@.service"},
		vm.File{Path: agentConfig, Content: []byte(`{"provider": {"address": "unix:` + deviceOf("web") + `"}}`)},
		vmFile("web"), vmFile("other"),
		unit("standin@.service", "[Unit]", "Requires=way@%i.socket", "After=way@%i.socket",
			"[Service]", "Type=notify", "User="+vmUser, "UMask=0022", "RuntimeDirectory=standin-%i",
			"ExecStart="+standin+" vmm "+vmFolders+"%i/notify.vsock /run/way-%i.sock /run/standin-%i/device.sock"),
		// An agent takes local calls from root only, which no VMM is.
		unit("way@.socket", "[Socket]", "ListenStream=/run/way-%i.sock", "SocketMode=0666"),
		unit("way@.service", "[Service]", "ExecStart=/usr/lib/systemd/systemd-socket-proxyd /run/guests/%i/run/guestagent/varlink.sock"),
		unit(otherAgent, "[Service]", "ExecStart=/usr/bin/guestagent --root "+otherRoot+" serve"),
	)
}

// prepareHost makes what a host of two VMs has.
func prepareHost(t *testing.T, m *vm.Machine) {
	t.Helper()
	vmtest.Run(t, m, "useradd", "--system", "--user-group", vmUser)
	vmtest.Run(t, m, "groupadd", "--system", watchers)
	vmtest.Run(t, m, "useradd", "--system", "--user-group", "--groups", watchers, watcher)
	vmtest.Run(t, m, "mkdir", "-p", otherRoot+"/etc/guestagent", otherRoot+"/run", otherRoot+"/proc/sys/kernel/random")
	vmtest.Run(t, m, "cp", "/proc/sys/kernel/random/boot_id", otherRoot+"/proc/sys/kernel/random/boot_id")
	vmtest.Run(t, m, "ln", "-s", "/", "/run/guests/web")
	vmtest.Run(t, m, "systemctl", "start", otherAgent)
	for _, name := range []string{"web", "other"} {
		makeFolder(t, m, name)
	}
}

func makeFolder(t *testing.T, m *vm.Machine, name string) {
	t.Helper()
	vmtest.Run(t, m, "install", "-d", "-m", "0755", vmFolders)
	vmtest.Run(t, m, "install", "-d", "-m", "0755", "-o", vmUser, "-g", vmUser, vmFolders+name)
}

// as returns a command that runs as a user, with the groups that the user has.
func as(user string, argv ...string) vm.Command {
	return vm.Command{Argv: append([]string{
		"setpriv", "--reuid=" + user, "--regid=" + user, "--init-groups", "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs",
	}, argv...)}
}

// asOtherRoot returns a command that runs as root in a user namespace of nobody's.
func asOtherRoot(argv ...string) vm.Command {
	return asNobody(append([]string{"unshare", "--user", "--map-root-user"}, argv...)...)
}

// ringAt is the answer to who rings in the guest: "" or the provider's error, or what kept it from coming.
func ringAt(t *testing.T, m *vm.Machine, name string) string {
	t.Helper()
	var answer struct {
		Error string `json:"error"`
	}
	res := vmtest.Exec(t, m, vm.Command{Argv: []string{standin, "call", deviceOf(name), ringCall}})
	if res.ExitCode != 0 {
		return "no answer: " + string(res.Stderr)
	}
	if err := json.Unmarshal(bytes.TrimRight(res.Stdout, "\x00"), &answer); err != nil {
		t.Fatalf("the answer to a ring = %q: %v", res.Stdout, err)
	}
	return answer.Error
}

// ring rings in the guest of that VM, which has its set then.
func ring(t *testing.T, m *vm.Machine, name string) {
	t.Helper()
	if got := ringAt(t, m, name); got != "" {
		t.Errorf("ringing in %s = %s, want its set in force", name, got)
	}
}

// hostReport asks a VM's provider.
func hostReport(t *testing.T, m *vm.Machine, name string) vsockrpc.ProviderStatus {
	t.Helper()
	return decodeStatus(t, vmtest.Run(t, m, standin, "call", statusOf(name), statusCall))
}

func decodeStatus(t *testing.T, message string) vsockrpc.ProviderStatus {
	t.Helper()
	var answer struct {
		Parameters vsockrpc.ProviderStatus `json:"parameters"`
	}
	if err := json.Unmarshal([]byte(strings.TrimRight(message, "\x00")), &answer); err != nil {
		t.Fatalf("the provider's status = %q: %v", message, err)
	}
	return answer.Parameters
}

// untilHost waits until a VM's provider tells of that state.
func untilHost(t *testing.T, m *vm.Machine, name, state string) {
	t.Helper()
	until(t, "the state of "+name, state, func() string { return hostReport(t, m, name).State })
}

// untilBell waits until somebody listens where the VM's guest rings.
func untilBell(t *testing.T, m *vm.Machine, name string) {
	t.Helper()
	eventually(t, "the socket of "+name+" is there", func() bool {
		return vmtest.Exec(t, m, vm.Command{Argv: []string{"test", "-S", bellOf(name)}}).ExitCode == 0
	})
}

func wantBell(t *testing.T, m *vm.Machine, name string) {
	t.Helper()
	if got, want := vmtest.Run(t, m, "stat", "--format=%U %G %a %F", bellOf(name)), vmUser+" "+vmUser+" 600 socket\n"; got != want {
		t.Errorf("the socket of %s is %q, want %q", name, got, want)
	}
}

// generationOf is the generation of the guest web, with its labels.
func generationOf(t *testing.T, m *vm.Machine) (int64, map[string]string) {
	t.Helper()
	r := guestReport(t, m)
	return r.Generation, revisions(&r)
}

// journalOf is what a unit has said since the cursor.
func journalOf(t *testing.T, m *vm.Machine, unit, since string) string {
	t.Helper()
	return vmtest.Run(t, m, "journalctl", "--no-pager", "--output=cat", "--unit="+unit, "--after-cursor="+since)
}

// TestProvideHost runs the shipped unit of the host's end, with real systemd on that side too.
func TestProvideHost(t *testing.T) {
	vmtest.Releases(t) // skips before anything is built
	files := hostFiles(t)
	vmtest.Each(t, func(t *testing.T, release vm.Release) {
		t.Parallel()
		m := vmtest.StartContainer(t, vm.ContainerConfig{Image: vmtest.Image(t, release), Overlay: files, WaitFor: vm.UntilGuest})
		prepareHost(t, m)
		h := &providerHost{m: m, release: release}
		h.allow(t, vmFolders+"web")
		h.db, h.key = h.secret(t, "web", "db"), h.secret(t, "web", "key")
		for _, tt := range []struct {
			name string
			test func(*testing.T, *providerHost)
		}{
			{"before the VMM", testHostFirst},
			{"after the VMM", testHostLate},
			{"restart", testHostRestart},
			{"reload", testHostReload},
			{"VMM restarted", testHostVMM},
			{"second provider", testHostSecond},
			{"VMM's user", testHostUser},
			{"other users", testHostOthers},
			{"two VMs", testHostTwo},
			{"folder", testHostFolder},
			{"exposure", testHostExposure},
			{"canary", testHostCanary},
		} {
			if !t.Run(tt.name, func(t *testing.T) { tt.test(t, h) }) {
				break // each builds on those before
			}
		}
	})
}

// A providerHost is a host while it is tested.
type providerHost struct {
	m       *vm.Machine
	release vm.Release
	db, key []byte // that web should have
	other   []byte // that other should have as its db
	values  [][]byte
}

// allow writes the drop-in of the provider of web, which may write to that folder.
func (h *providerHost) allow(t *testing.T, folder string) {
	t.Helper()
	dropIn(t, h.m, "web", "vm.conf", "LoadCredential=db:"+hostSecrets+"web-db", "LoadCredential=key:"+hostSecrets+"web-key", "ReadWritePaths="+folder)
}

// secret gives the host a secret that is root's, by the name of the VM and that of the credential.
func (h *providerHost) secret(t *testing.T, name, cred string) []byte {
	t.Helper()
	value := newValue()
	vmtest.WriteFile(t, h.m, hostSecrets+name+"-"+cred, 0o600, value)
	h.values = append(h.values, value)
	return value
}

// wantSet checks what the guest web has.
func (h *providerHost) wantSet(t *testing.T) {
	t.Helper()
	wantFile(t, h.m, "/run/credstore/db", h.db)
	wantFile(t, h.m, "/run/credstore/key", h.key)
}

func testHostFirst(t *testing.T, h *providerHost) {
	start(t, h.m, providerOf("web")) // returns with READY=1
	wantBell(t, h.m, "web")
	if s := hostReport(t, h.m, "web"); s.State != vsockrpc.GuestWaiting || s.Name != "web" {
		t.Errorf("the status is %+v, want it to wait", s)
	}
	start(t, h.m, vmmOf("web"))
	eventually(t, "the guest has its set", func() bool { return providerState(t, h.m) == vsockrpc.ProviderInForce })
	h.wantSet(t)
	untilState(t, h.m, "active", pullService, credTarget)
	untilHost(t, h.m, "web", vsockrpc.GuestInForce)
	eventually(t, "the unit's status says so", func() bool {
		return strings.Contains(show(t, h.m, providerOf("web"), "StatusText"), "web: the set is in force")
	})
	if g, _ := generationOf(t, h.m); g != 1 {
		t.Errorf("the generation is %d, want 1", g)
	}
}

func testHostLate(t *testing.T, h *providerHost) {
	g, before := generationOf(t, h.m)
	vmtest.Run(t, h.m, "systemctl", "stop", providerOf("web"))
	wantNoFile(t, h.m, bellOf("web"))
	if got := ringAt(t, h.m, "web"); !strings.HasPrefix(got, "no answer") {
		t.Errorf("ringing without a provider = %q", got)
	}
	start(t, h.m, providerOf("web"))
	wantBell(t, h.m, "web")
	ring(t, h.m, "web")
	if now, after := generationOf(t, h.m); now != g || fmt.Sprint(before) != fmt.Sprint(after) {
		t.Errorf("generation %d, labels %v, want %d, %v", now, after, g, before)
	}
	h.wantSet(t)
}

// wantChange checks that one change has come to the guest since, that of db, and that nothing comes after it.
func (h *providerHost) wantChange(t *testing.T, g int64, before map[string]string) {
	t.Helper()
	eventually(t, "the change is there", func() bool { now, _ := generationOf(t, h.m); return now > g })
	ring(t, h.m, "web")
	now, after := generationOf(t, h.m)
	if now != g+1 || after["db"] == before["db"] || after["key"] != before["key"] {
		t.Errorf("generation %d, labels %v, want %d and another label of db than in %v", now, after, g+1, before)
	}
	h.wantSet(t)
}

// wantNoChange checks that nothing has come to the guest since.
func (h *providerHost) wantNoChange(t *testing.T, g int64, before map[string]string) {
	t.Helper()
	ring(t, h.m, "web")
	if now, after := generationOf(t, h.m); now != g || fmt.Sprint(before) != fmt.Sprint(after) {
		t.Errorf("generation %d, labels %v, want %d, %v", now, after, g, before)
	}
}

func testHostRestart(t *testing.T, h *providerHost) {
	g, before := generationOf(t, h.m)
	h.db = h.secret(t, "web", "db")
	vmtest.Run(t, h.m, "systemctl", "restart", providerOf("web"))
	h.wantChange(t, g, before)

	g, before = generationOf(t, h.m)
	vmtest.Run(t, h.m, "systemctl", "restart", providerOf("web"))
	h.wantNoChange(t, g, before)
	vmtest.Run(t, h.m, "systemctl", "kill", "--signal=KILL", providerOf("web"))
	eventually(t, "systemd has started it again", func() bool { return show(t, h.m, providerOf("web"), "NRestarts") == "1" })
	untilState(t, h.m, "active", providerOf("web"))
	untilBell(t, h.m, "web")
	h.wantNoChange(t, g, before)
	h.wantSet(t)
}

func testHostReload(t *testing.T, h *providerHost) {
	g, before := generationOf(t, h.m)
	pid := mainPID(t, h.m, providerOf("web"))
	// $CREDENTIALS_DIRECTORY stays as it is, unless the unit says otherwise.
	next := h.secret(t, "web", "db")
	vmtest.Run(t, h.m, "systemctl", "reload", providerOf("web"))
	h.wantNoChange(t, g, before)
	h.wantSet(t)

	h.db = next
	if h.release.Systemd < 260 {
		vmtest.Run(t, h.m, "systemctl", "restart", providerOf("web"))
		h.wantChange(t, g, before)
		return
	}
	dropIn(t, h.m, "web", "reload.conf", "RefreshOnReload=credentials")
	vmtest.Run(t, h.m, "systemctl", "reload", providerOf("web"))
	h.wantChange(t, g, before)
	g, before = generationOf(t, h.m)
	vmtest.Run(t, h.m, "systemctl", "reload", providerOf("web"))
	h.wantNoChange(t, g, before)

	// A secret that cannot be loaded takes nothing away.
	vmtest.Run(t, h.m, "mv", hostSecrets+"web-db", hostSecrets+"away")
	if res := vmtest.Exec(t, h.m, vm.Command{Argv: []string{"systemctl", "reload", providerOf("web")}}); res.ExitCode == 0 {
		t.Error("a reload without the secret succeeds")
	}
	untilState(t, h.m, "active", providerOf("web"))
	h.wantNoChange(t, g, before)
	vmtest.Run(t, h.m, "mv", hostSecrets+"away", hostSecrets+"web-db")
	h.wantSet(t)
	if now := mainPID(t, h.m, providerOf("web")); now != pid {
		t.Errorf("the provider was process %d, and is %d", pid, now)
	}
}

func testHostVMM(t *testing.T, h *providerHost) {
	g, before := generationOf(t, h.m)
	since := cursor(t, h.m)
	for range 3 {
		vmtest.Run(t, h.m, "systemctl", "stop", vmmOf("web"))
		// As runners do.
		vmtest.Run(t, h.m, "sh", "-c", "rm -f "+vmFolders+"web/notify.vsock*")
		start(t, h.m, vmmOf("web"))
		untilBell(t, h.m, "web")
		eventually(t, "a ring is answered", func() bool { return ringAt(t, h.m, "web") == "" })
		wantBell(t, h.m, "web")
	}
	h.wantNoChange(t, g, before)
	untilHost(t, h.m, "web", vsockrpc.GuestInForce)

	// It comes back without anybody's doing, and by itself it does not go.
	vmtest.Run(t, h.m, "rm", bellOf("web"))
	untilBell(t, h.m, "web")
	first := vmtest.Run(t, h.m, "stat", "--format=%i %W", bellOf("web"))
	ring(t, h.m, "web")
	ring(t, h.m, "web")
	if got := vmtest.Run(t, h.m, "stat", "--format=%i %W", bellOf("web")); got != first {
		t.Errorf("the socket is file %s, and was %s", got, first)
	}
	if got := journalOf(t, h.m, providerOf("web"), since); strings.Contains(got, "level=ERROR") {
		t.Errorf("the provider says\n%s", got)
	}
}

func testHostSecond(t *testing.T, h *providerHost) {
	for _, flags := range [][]string{{"--vm", "web"}, {"--listen-mux", vmFolders + "web/notify.vsock"}} {
		res := vmtest.Exec(t, h.m, vm.Command{Argv: append([]string{"guestctl", "provide", "--dir", hostSecrets}, flags...)})
		if got := string(res.Stderr); res.ExitCode != 1 || !strings.Contains(got, "another provider runs for this VM") || strings.Contains(got, "usage") {
			t.Errorf("a second provider with %q: status %d\n%s", flags, res.ExitCode, got)
		}
	}
	wantBell(t, h.m, "web")
	ring(t, h.m, "web")
	h.wantSet(t)
}

// wantDenied checks that a command of that user is denied what it tries.
func wantDenied(t *testing.T, m *vm.Machine, who string, c vm.Command) {
	t.Helper()
	res := vmtest.Exec(t, m, c)
	said := string(res.Stdout) + string(res.Stderr)
	if res.ExitCode == 0 || !strings.Contains(said, "Permission denied") && !strings.Contains(said, "EACCES") {
		t.Errorf("%s, %q: status %d\n%s\nwant it denied", who, c.Argv, res.ExitCode, said)
	}
}

// secretPlaces are the files and folders that only root may look into.
func secretPlaces(t *testing.T, m *vm.Machine, name string) (files, folders []string) {
	t.Helper()
	proc := fmt.Sprintf("/proc/%d/", mainPID(t, m, providerOf(name)))
	dir := "/run/credentials/" + providerOf(name)
	return []string{dir + "/db", proc + "environ", proc + "mem", proc + "maps", proc + "root" + dir + "/db", "/run/guestagent/provide/labels/" + name + "/labels.json", hostSecrets + name + "-db"},
		[]string{dir, proc + "root/", proc + "cwd/", proc + "fd", proc + "fdinfo", "/run/guestagent/provide/labels/" + name, hostSecrets}
}

func testHostUser(t *testing.T, h *providerHost) {
	files, folders := secretPlaces(t, h.m, "web")
	for _, f := range files {
		vmtest.Run(t, h.m, "test", "-e", f)
		wantDenied(t, h.m, vmUser, as(vmUser, "head", "--bytes=1", f))
	}
	for _, f := range folders {
		vmtest.Run(t, h.m, "test", "-e", f)
		wantDenied(t, h.m, vmUser, as(vmUser, "ls", f))
	}
	wantDenied(t, h.m, vmUser, as(vmUser, standin, "call", statusOf("web"), statusCall))

	// Nor does a link in the socket's place get it anything.
	before := vmtest.Run(t, h.m, "stat", "--format=%U %G %a", "/etc/shadow", statusOf("web"))
	for _, target := range []string{"/etc/shadow", statusOf("web")} {
		since := cursor(t, h.m)
		if res := vmtest.Exec(t, h.m, as(vmUser, "ln", "-sf", target, bellOf("web"))); res.ExitCode != 0 {
			t.Errorf("making a link: %s", res.Stderr)
		}
		eventually(t, "the provider has seen the link", func() bool {
			return strings.Contains(journalOf(t, h.m, providerOf("web"), since), "a symbolic link is there")
		})
		vmtest.Exec(t, h.m, as(vmUser, "rm", bellOf("web")))
		untilBell(t, h.m, "web")
	}
	if got := vmtest.Run(t, h.m, "stat", "--format=%U %G %a", "/etc/shadow", statusOf("web")); got != before {
		t.Errorf("what the links led to is\n%s, and was\n%s", got, before)
	}
	wantBell(t, h.m, "web")

	// What it may is ring, and that brings it nothing.
	res := vmtest.Exec(t, h.m, as(vmUser, standin, "call", bellOf("web"), ringCall))
	if got := string(res.Stdout); res.ExitCode != 0 || got != `{"parameters":{}}`+"\x00" {
		t.Errorf("ringing as %s = %q, status %d", vmUser, got, res.ExitCode)
	}
	for _, method := range []string{"io.guestagent.Provider.Status", "io.guestagent.Credentials.List", "io.guestagent.Health.Get"} {
		res := vmtest.Exec(t, h.m, as(vmUser, standin, "call", bellOf("web"), `{"method":"`+method+`"}`))
		if got := string(res.Stdout); !strings.Contains(got, `"org.varlink.service.`) {
			t.Errorf("%s as %s = %q, want it refused", method, vmUser, got)
		}
	}
}

func testHostOthers(t *testing.T, h *providerHost) {
	who := map[string]func(...string) vm.Command{"nobody": asNobody, "root in a namespace": asOtherRoot, watcher: func(argv ...string) vm.Command { return as(watcher, argv...) }}
	if got := vmtest.Exec(t, h.m, asOtherRoot("id", "-u")); string(got.Stdout) != "0\n" {
		t.Fatalf("a namespace of nobody's: %q\n%s", got.Stdout, got.Stderr)
	}
	files, folders := secretPlaces(t, h.m, "web")
	for name, c := range who {
		wantDenied(t, h.m, name, c(standin, "call", bellOf("web"), ringCall))
		wantDenied(t, h.m, name, c(standin, "call", statusOf("web"), statusCall))
		for _, f := range files {
			wantDenied(t, h.m, name, c("head", "--bytes=1", f))
		}
		for _, f := range folders {
			wantDenied(t, h.m, name, c("ls", f))
		}
	}
	// A VMM's user that lets others in lets nobody in.
	vmtest.Exec(t, h.m, as(vmUser, "chmod", "0666", bellOf("web")))
	for _, name := range []string{"nobody", "root in a namespace"} {
		res := vmtest.Exec(t, h.m, who[name](standin, "call", bellOf("web"), ringCall))
		if res.ExitCode == 0 || len(bytes.TrimSpace(res.Stdout)) > 0 {
			t.Errorf("ringing as %s at a socket that is open to all = %q, want no answer", name, res.Stdout)
		}
	}
	vmtest.Exec(t, h.m, as(vmUser, "chmod", "0600", bellOf("web")))
	ring(t, h.m, "web")
}

func testHostTwo(t *testing.T, h *providerHost) {
	h.other = h.secret(t, "other", "db")
	dropIn(t, h.m, "other", "vm.conf", "LoadCredential=db:"+hostSecrets+"other-db", "ReadWritePaths="+vmFolders+"other", `Environment="PROVIDE_OPTIONS=--report-group `+watchers+`"`)
	start(t, h.m, vmmOf("other"), providerOf("other"))
	otherStore := otherRoot + "/run/credstore/"
	untilHost(t, h.m, "other", vsockrpc.GuestInForce)
	wantFile(t, h.m, otherStore+"db", h.other)
	wantNoFile(t, h.m, otherStore+"key")
	h.wantSet(t)

	// Neither sees what the other hands over.
	for _, name := range []string{"web", "other"} {
		dir := fmt.Sprintf("/proc/%d/root/run/credentials/", mainPID(t, h.m, providerOf(name)))
		if got := strings.Fields(vmtest.Run(t, h.m, "ls", "-A", dir)); !slices.Equal(got, []string{providerOf(name)}) {
			t.Errorf("the provider of %s sees %q, want its own", name, got)
		}
	}
	wantGiven(t, h.m, providerOf("web"), "db", h.db)
	wantGiven(t, h.m, providerOf("other"), "db", h.other)

	// What one guest lacks is brought again, whoever rings, and the other guest stays as it is.
	g, labels := generationOf(t, h.m)
	vmtest.Run(t, h.m, "rm", otherStore+"db")
	for range 3 {
		ring(t, h.m, "web")
	}
	eventually(t, "the value is there again", func() bool {
		b, err := h.m.ReadFile(t.Context(), otherStore+"db")
		return err == nil && bytes.Equal(b, h.other)
	})
	ring(t, h.m, "other")
	h.other = h.secret(t, "other", "db")
	vmtest.Run(t, h.m, "systemctl", "restart", providerOf("other"))
	ring(t, h.m, "other")
	wantFile(t, h.m, otherStore+"db", h.other)
	h.wantNoChange(t, g, labels)

	t.Run("report group", func(t *testing.T) { testHostGroup(t, h) })
}

// testHostGroup has a member of the report group ask, and try what else there is.
func testHostGroup(t *testing.T, h *providerHost) {
	if got, want := vmtest.Run(t, h.m, "stat", "--format=%U %G %a %F", statusOf("other")), "root "+watchers+" 660 socket\n"; got != want {
		t.Errorf("the status socket is %q, want %q", got, want)
	}
	untilHost(t, h.m, "other", vsockrpc.GuestInForce)
	res := vmtest.Exec(t, h.m, as(watcher, standin, "call", statusOf("other"), statusCall))
	if s := decodeStatus(t, string(res.Stdout)); s.State != vsockrpc.GuestInForce || s.Report == nil || len(s.Report.Entries) != 1 {
		t.Errorf("the status for the group = %+v\n%s", s, res.Stderr)
	}
	if bytes.Contains(res.Stdout, []byte(mark)) {
		t.Error("the status has a value")
	}
	for _, method := range []string{
		"Provider.Ring", "Provider.Reload", "Credentials.Apply", "Credentials.Remove", "Credentials.Rollback", "Credentials.Retry", "Credentials.Refresh", "Credentials.List", "Health.Get",
	} {
		res := vmtest.Exec(t, h.m, as(watcher, standin, "call", statusOf("other"), `{"method":"io.guestagent.`+method+`","parameters":{}}`))
		if got := string(res.Stdout); !strings.Contains(got, `"org.varlink.service.`) {
			t.Errorf("%s for the group = %q, want that there is none", method, got)
		}
	}
	for who, c := range map[string]vm.Command{
		vmUser: as(vmUser, standin, "call", statusOf("other"), statusCall), "nobody": asNobody(standin, "call", statusOf("other"), statusCall),
		watcher: as(watcher, standin, "call", bellOf("other"), ringCall),
	} {
		wantDenied(t, h.m, who, c)
	}
}

// testHostFolder removes the VM's folder and makes it again, as some runners do.
func testHostFolder(t *testing.T, h *providerHost) {
	again := func() {
		vmtest.Run(t, h.m, "systemctl", "stop", vmmOf("web"))
		vmtest.Run(t, h.m, "rm", "-rf", vmFolders+"web")
		makeFolder(t, h.m, "web")
		start(t, h.m, vmmOf("web"))
	}
	g, before := generationOf(t, h.m)
	// The folder that the unit may write to is gone, and what is there now it may not.
	since := cursor(t, h.m)
	again()
	eventually(t, "the provider tells", func() bool {
		return strings.Contains(journalOf(t, h.m, providerOf("web"), since), "read-only file system; name the folder in the unit's ReadWritePaths=")
	})
	if got := ringAt(t, h.m, "web"); !strings.HasPrefix(got, "no answer") {
		t.Errorf("ringing = %q, want no answer", got)
	}
	// It calls the guest all the same.
	untilHost(t, h.m, "web", vsockrpc.GuestInForce)
	vmtest.Run(t, h.m, "systemctl", "restart", providerOf("web"))
	h.wantNoChange(t, g, before)

	// Where the folder above is named it does not matter, not even at the start.
	h.allow(t, vmFolders)
	vmtest.Run(t, h.m, "systemctl", "restart", providerOf("web"))
	for range 2 {
		again()
		untilBell(t, h.m, "web")
		eventually(t, "a ring is answered", func() bool { return ringAt(t, h.m, "web") == "" })
		wantBell(t, h.m, "web")
	}
	vmtest.Run(t, h.m, "systemctl", "stop", vmmOf("web"), providerOf("web"))
	vmtest.Run(t, h.m, "rm", "-rf", vmFolders+"web")
	start(t, h.m, providerOf("web"))
	makeFolder(t, h.m, "web")
	start(t, h.m, vmmOf("web"))
	untilBell(t, h.m, "web")
	wantBell(t, h.m, "web")
	h.wantNoChange(t, g, before)
	h.wantSet(t)

	// A folder that is named itself and not there keeps the unit from starting; it is tried again.
	vmtest.Run(t, h.m, "systemctl", "stop", vmmOf("web"), providerOf("web"))
	vmtest.Run(t, h.m, "rm", "-rf", vmFolders+"web")
	h.allow(t, vmFolders+"web")
	begin(t, h.m, providerOf("web"))
	until(t, "the unit cannot start", "226", func() string { return show(t, h.m, providerOf("web"), "ExecMainStatus") })
	makeFolder(t, h.m, "web")
	untilState(t, h.m, "active", providerOf("web"))
	wantBell(t, h.m, "web")
	start(t, h.m, vmmOf("web"))
	h.wantNoChange(t, g, before)
}

// exposure checks what systemd thinks of a unit's sandbox.
func exposure(t *testing.T, m *vm.Machine, unit string, limit float64) {
	t.Helper()
	out := vmtest.Run(t, m, "systemd-analyze", "security", "--no-pager", unit)
	_, level, _ := strings.Cut(out, "exposure level for "+unit+": ")
	level, _, _ = strings.Cut(level, " ")
	if n, err := strconv.ParseFloat(level, 64); err != nil || n >= limit {
		t.Errorf("exposure %s, want below %g\n%s", level, limit, out)
	}
	t.Logf("exposure level %s", level)
}

func testHostExposure(t *testing.T, h *providerHost) {
	exposure(t, h.m, providerOf("web"), 2.5)
	process := vmtest.Run(t, h.m, "cat", fmt.Sprintf("/proc/%d/status", mainPID(t, h.m, providerOf("web"))), fmt.Sprintf("/proc/%d/limits", mainPID(t, h.m, providerOf("web"))))
	// CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_NET_BIND_SERVICE.
	process = strings.Join(strings.Fields(process), " ")
	for _, want := range []string{"CapEff: 0000000000000403 ", "CapBnd: 0000000000000403 ", "NoNewPrivs: 1 ", "Seccomp: 2 ", "Max core file size 0 0 "} {
		if !strings.Contains(process, want) {
			t.Errorf("the provider's process lacks %q:\n%s", want, process)
		}
	}
}

func testHostCanary(t *testing.T, h *providerHost) {
	var forms [][]byte
	for _, v := range h.values {
		forms = append(forms, canary.Forms(v)...)
	}
	journal, err := h.m.Journal(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var status []byte
	for _, name := range []string{"web", "other"} {
		status = append(status, vmtest.Run(t, h.m, standin, "call", statusOf(name), statusCall)...)
	}
	for what, b := range map[string][]byte{
		"the journal":       journal,
		"the status":        status,
		"a process":         []byte(vmtest.Run(t, h.m, "sh", "-c", "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null || true")),
		"the state":         []byte(vmtest.Run(t, h.m, "sh", "-c", "cat /run/guestagent/provide/labels/*/labels.json")),
		"systemctl show":    []byte(vmtest.Run(t, h.m, "systemctl", "show", providerOf("web"), providerOf("other"))),
		"the VMs' folders":  []byte(vmtest.Run(t, h.m, "sh", "-c", "find "+filepath.Clean(vmFolders)+" -type f -exec cat {} +")),
		"the runtime state": []byte(vmtest.Run(t, h.m, "sh", "-c", "find /run/guestagent /run/systemd -type f -exec cat {} + 2>/dev/null || true")),
	} {
		if n, err := canary.Scan(bytes.NewReader(b), forms); n >= 0 || err != nil {
			t.Errorf("%s has a value at %d, %v", what, n, err)
		}
		if bytes.Contains(b, []byte(mark)) {
			t.Errorf("%s has a value", what)
		}
	}
}
