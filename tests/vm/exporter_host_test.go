package vm_test

import (
	"fmt"
	"strconv"
	"strings"
	"testing"

	"github.com/guestagent/guestagent/tests/vm"
	"github.com/guestagent/guestagent/tests/vm/vmtest"
)

const exporterUnit = "guestagent-exporter.service"

// scrapeIn is what the exporter in a container answers.
func scrapeIn(t *testing.T, m *vm.Machine, path string) string {
	t.Helper()
	return vmtest.Run(t, m, "bash", "-c", `exec 3<>/dev/tcp/127.0.0.1/9774 && printf 'GET `+path+` HTTP/1.0\r\n\r\n' >&3 && cat <&3`)
}

// TestExporterHost has the units as they are shipped, set up as they say: the exporter is nobody, and is told how the guest is
// by its provider alone.
func TestExporterHost(t *testing.T) {
	vmtest.Releases(t) // skips before anything is built
	files := append(hostFiles(t),
		vm.File{Path: unitDir + exporterUnit, Source: "../../systemd/host/guestagent-exporter.service"},
		vm.File{Path: unitDir + "guestagent-exporter.socket", Source: "../../systemd/host/guestagent-exporter.socket"},
		vm.File{Path: "/etc/sysusers.d/guestagent.conf", Content: []byte("g guestagent -\n")},
		vm.File{Path: "/etc/systemd/system/guestagent-provide@.service.d/report.conf", Content: []byte(lines("[Service]",
			`Environment="PROVIDE_OPTIONS=--report-group guestagent"`))},
	)
	vmtest.Each(t, func(t *testing.T, release vm.Release) {
		t.Parallel()
		m := vmtest.StartContainer(t, vm.ContainerConfig{Image: vmtest.Image(t, release), Overlay: files, WaitFor: vm.UntilGuest})
		prepareHost(t, m)
		vmtest.Run(t, m, "systemd-sysusers")
		h := &providerHost{m: m, release: release}
		h.allow(t, vmFolders+"web")
		h.db, h.key = h.secret(t, "web", "db"), h.secret(t, "web", "key")
		start(t, m, "guestagent-exporter.socket", exporterUnit, providerOf("web"), vmmOf("web"))

		eventually(t, "the guest is shown", func() bool {
			metrics := scrapeIn(t, m, "/metrics")
			return strings.Contains(metrics, `guestagent_provider_state{state="inForce",vm="web"} 1`) &&
				strings.Contains(metrics, `guestagent_credential_state{credential="db",state="inForce",vm="web"} 1`) &&
				strings.Contains(metrics, `guestagent_up{vm="web"} 1`) && strings.Contains(metrics, `guestagent_up{vm="other"} 0`)
		})
		if got := scrapeIn(t, m, "/healthz"); !strings.HasPrefix(got, "HTTP/1.0 200 ") {
			t.Errorf("GET /healthz = %q", got)
		}

		process := strings.Join(strings.Fields(vmtest.Run(t, m, "cat", fmt.Sprintf("/proc/%d/status", mainPID(t, m, exporterUnit)))), " ")
		for _, want := range []string{"CapPrm: 0000000000000000 ", "CapEff: 0000000000000000 ", "CapBnd: 0000000000000000 ", "NoNewPrivs: 1 ", "Seccomp: 2 "} {
			if !strings.Contains(process, want) {
				t.Errorf("the exporter's process lacks %q:\n%s", want, process)
			}
		}
		if strings.Contains(process, " Uid: 0 ") {
			t.Error("the exporter is root")
		}
		out := vmtest.Run(t, m, "systemd-analyze", "security", "--no-pager", exporterUnit)
		_, level, _ := strings.Cut(out, "exposure level for "+exporterUnit+": ")
		level, _, _ = strings.Cut(level, " ")
		if n, err := strconv.ParseFloat(level, 64); err != nil || n >= 2 {
			t.Errorf("exposure %s, want below 2\n%s", level, out)
		}
		vmtest.Run(t, m, "systemctl", "stop", exporterUnit)
		if got := show(t, m, exporterUnit, "Result"); got != "success" {
			t.Errorf("the exporter ended with %q", got)
		}
		if journal := vmtest.Run(t, m, "journalctl", "--no-pager", "--output=cat", "--unit="+exporterUnit); strings.Contains(journal, "level=") {
			t.Errorf("the exporter says\n%s", journal)
		}
	})
}
