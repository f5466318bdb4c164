package health

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func sample(tb testing.TB, name string) string {
	tb.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		tb.Fatal(err)
	}
	return string(b)
}

func TestParseMeminfo(t *testing.T) {
	got, err := parseMeminfo(sample(t, "meminfo"))
	if want := (Memory{Total: 24684084 << 10, Available: 24163676 << 10}); err != nil || got != want {
		t.Errorf("parseMeminfo() = %+v, %v, want %+v", got, err, want)
	}
	for _, s := range []string{
		"", "MemTotal: 1 kB\n", "MemAvailable: 1 kB\n", "MemTotal: 1 MB\nMemAvailable: 1 kB\n", "MemTotal: 1\nMemAvailable: 1 kB\n",
		"MemTotal: -1 kB\nMemAvailable: 1 kB\n", "MemTotal: 18014398509481984 kB\nMemAvailable: 1 kB\n", "MemTotal: x kB\nMemAvailable: 1 kB\n",
	} {
		if got, err := parseMeminfo(s); err == nil || got != (Memory{}) {
			t.Errorf("parseMeminfo(%q) = %+v, %v", s, got, err)
		}
	}
}

func TestParseStall(t *testing.T) {
	for _, tc := range []struct {
		s    string
		want Stall
	}{
		{sample(t, "pressure"), Stall{Some: Share{Avg10: 26, Avg60: 1534, Avg300: 10000}, Full: Share{Avg10: 5, Avg60: 0, Avg300: 103}}},
		{"some avg10=0.05 avg60=0.15 avg300=1.96 total=6824673466\n", Stall{Some: Share{Avg10: 5, Avg60: 15, Avg300: 196}}},
		{"\nirq avg10=x\nsome avg5=x avg10=1.00 avg60=2.00 avg300=3.00 avg900=y total=-\n", Stall{Some: Share{Avg10: 100, Avg60: 200, Avg300: 300}}},
	} {
		if got, err := parseStall(tc.s); err != nil || *got != tc.want {
			t.Errorf("parseStall(%q) = %+v, %v, want %+v", tc.s, got, err, tc.want)
		}
	}
	for _, s := range []string{
		"", "some\n", "some avg10=1.00 avg60=2.00\n", "full avg10=1.00 avg60=2.00 avg300=3.00\n", "some avg10 avg60=2.00 avg300=3.00\n",
		"some avg10=1 avg60=2.00 avg300=3.00\n", "some avg10=-1.00 avg60=2.00 avg300=3.00\n",
	} {
		if got, err := parseStall(s); err == nil || got != nil {
			t.Errorf("parseStall(%q) = %+v, %v", s, got, err)
		}
	}
}

func TestParseLoad(t *testing.T) {
	if got, err := parseLoad("0.25 1.07 12.00 1/83 20385\n"); err != nil || got != [3]int{25, 107, 1200} {
		t.Errorf("parseLoad() = %v, %v", got, err)
	}
	for _, s := range []string{"", "0.25 1.07", "0.25 1.07 x", "0.25 1.07 nan 1/83"} {
		if got, err := parseLoad(s); err == nil || got != [3]int{} {
			t.Errorf("parseLoad(%q) = %v, %v", s, got, err)
		}
	}
}

func TestParseUptime(t *testing.T) {
	if got, err := parseUptime("34683.88 38595.10\n"); err != nil || got != 34683*time.Second+880*time.Millisecond {
		t.Errorf("parseUptime() = %v, %v", got, err)
	}
	for _, s := range []string{"", "\n", "34683 1.00", "-1.00", "9999999999.00 1.00"} {
		if got, err := parseUptime(s); err == nil || got != 0 {
			t.Errorf("parseUptime(%q) = %v, %v", s, got, err)
		}
	}
}

func TestParseMount(t *testing.T) {
	s := sample(t, "mountinfo")
	for _, tc := range []struct {
		id   uint64
		want mount
		ok   bool
	}{
		{22, mount{"254:0", false}, true}, // a read-only view of /
		{29, mount{"254:16", true}, true}, // read-only itself
		{130, mount{"0:40", false}, true}, // a subvolume, and options of its own
		{131, mount{"0:41", true}, true},  // no source
		{2, mount{}, false},               // not 22, nor 29
		{132, mount{}, false},             // cut off
		{133, mount{}, false},             // not there
		{134, mount{"0:43", false}, true}, // ro is not its first option
		{135, mount{"0:44", false}, true}, // a mount point with a dash
	} {
		if got, ok := parseMount(s, tc.id); ok != tc.ok || got != tc.want {
			t.Errorf("parseMount(%d) = %+v, %v, want %+v, %v", tc.id, got, ok, tc.want, tc.ok)
		}
	}
}

func FuzzParsers(f *testing.F) {
	for _, name := range []string{"meminfo", "pressure", "mountinfo"} {
		f.Add(sample(f, name))
	}
	f.Add("0.25 1.07 12.00 1/83 20385\n")
	decimal := func(n int) string { return fmt.Sprintf("%d.%02d", n/100, n%100) }
	f.Fuzz(func(t *testing.T, s string) {
		if m, err := parseMeminfo(s); err == nil {
			if again, err := parseMeminfo(fmt.Sprintf("MemTotal: %d kB\nMemAvailable: %d kB\n", m.Total>>10, m.Available>>10)); err != nil || again != m {
				t.Errorf("parseMeminfo(%q) = %+v, and again %+v", s, m, again)
			}
		} else if m != (Memory{}) {
			t.Errorf("parseMeminfo(%q) = %+v and an error", s, m)
		}
		if st, err := parseStall(s); err == nil {
			line := func(word string, s Share) string {
				return word + " avg10=" + decimal(s.Avg10) + " avg60=" + decimal(s.Avg60) + " avg300=" + decimal(s.Avg300) + " total=0\n"
			}
			if again, err := parseStall(line("some", st.Some) + line("full", st.Full)); err != nil || *again != *st {
				t.Errorf("parseStall(%q) = %+v, and again %+v", s, st, again)
			}
		} else if st != nil {
			t.Errorf("parseStall(%q) = %+v and an error", s, st)
		}
		if l, err := parseLoad(s); err == nil {
			if again, err := parseLoad(decimal(l[0]) + " " + decimal(l[1]) + " " + decimal(l[2])); err != nil || again != l {
				t.Errorf("parseLoad(%q) = %v, and again %v", s, l, again)
			}
		} else if l != [3]int{} {
			t.Errorf("parseLoad(%q) = %v and an error", s, l)
		}
		if u, err := parseUptime(s); u < 0 || err != nil && u != 0 {
			t.Errorf("parseUptime(%q) = %v, %v", s, u, err)
		}
		if m, ok := parseMount(s, 22); !ok && m != (mount{}) {
			t.Errorf("parseMount(%q) = %+v, false", s, m)
		}
	})
}
