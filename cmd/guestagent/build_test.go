package main

import (
	"debug/elf"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/guestagent/guestagent/internal/agent/agenttest"
)

// release builds the program as `make build` does.
func release(t testing.TB) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "guestagent")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w -X main.version=test", "-o", out, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building: %v\n%s", err, b)
	}
	return out
}

// The program is static and small: every guest has one, and some are small themselves.
func TestRelease(t *testing.T) {
	path := release(t)
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d bytes", st.Size())
	if limit := int64(6 << 20); st.Size() >= limit {
		t.Errorf("the program has %d bytes, want below %d", st.Size(), limit)
	}
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
			t.Errorf("the program is not static: it has %v", p.Type)
		}
	}
}

// BenchmarkImportProcess is a whole run of the program on a typical table: ten
// credentials of 100 bytes. cpu-ms is what the kernel counts for the process.
func BenchmarkImportProcess(b *testing.B) {
	path := release(b)
	root := b.TempDir()
	var oem []string
	for name := range strings.FieldsSeq("a b c d e f g h i j") {
		oem = append(oem, "io.guestagent.credential:"+name+"="+strings.Repeat("v", 100))
	}
	if err := agenttest.WriteSMBIOS(root, oem...); err != nil {
		b.Fatal(err)
	}
	var cpu time.Duration
	for b.Loop() {
		b.StopTimer()
		if err := os.RemoveAll(filepath.Join(root, "run")); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		cmd := exec.Command(path, "import", "--root", root)
		if out, err := cmd.CombinedOutput(); err != nil {
			b.Fatalf("%v\n%s", err, out)
		}
		cpu += cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	}
	b.ReportMetric(float64(cpu.Microseconds())/1000/float64(b.N), "cpu-ms/op")
}
