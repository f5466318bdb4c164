package vsockrpc

import (
	"errors"
	"strings"
	"testing"
)

func TestParseTarget(t *testing.T) {
	for s, want := range map[string]Target{
		"vsock:3":                     {SchemeVsock, 3, "", 1022},
		"vsock:4294967294:4294967294": {SchemeVsock, 4294967294, "", 4294967294},
		"vsock:2:1021":                {SchemeVsock, 2, "", 1021},
		"vsock-mux:/run/vm/v.sock":    {SchemeMux, 0, "/run/vm/v.sock", 1022},
		"vsock-mux:/run/v:1021":       {SchemeMux, 0, "/run/v", 1021},
		"vsock-mux:/run/v:8:1022":     {SchemeMux, 0, "/run/v:8", 1022},
		"vsock-mux:/run/v:x":          {SchemeMux, 0, "/run/v:x", 1022},
		"vsock-mux:v":                 {SchemeMux, 0, "v", 1022},
		"unix:/run/s":                 {SchemeUnix, 0, "/run/s", 0},
		"unix:/run/s:1022":            {SchemeUnix, 0, "/run/s:1022", 0},
		"unix:./@x":                   {SchemeUnix, 0, "./@x", 0},
	} {
		got, err := ParseTarget(s)
		if err != nil || got != want {
			t.Errorf("ParseTarget(%q) = %+v, %v, want %+v", s, got, err, want)
		}
		if got := got.String(); got != s {
			t.Errorf("String() = %q, want %q", got, s)
		}
	}
	if got, err := ParseTarget("vsock:3:1022"); err != nil || got.String() != "vsock:3" {
		t.Errorf("the default port is not left out: %v, %v", got, err)
	}
	for _, s := range []string{
		"", "vsock", "vsock:", "vsock:0", "vsock:-1", "vsock:+3", "vsock:03", "vsock:3:", "vsock:3:0", "vsock:3:x", "vsock:3:1:1", "vsock: 3",
		"vsock:4294967295", "vsock:4294967296", "vsock:3:4294967295", "vsock:٣", "unix:", "unix:@a", "unix:a\x00b", "vsock-mux:", "vsock-mux::1022",
		"vsock-mux:/v:", "vsock-mux:/v:0", "vsock-mux:/v:01", "vsock-mux:/v:99999999999", "vsock-mux:@v", "myvm", "/run/s", "tcp:1:2", "VSOCK:3",
		"unix:" + strings.Repeat("x", maxTargetLen),
	} {
		if got, err := ParseTarget(s); !errors.Is(err, ErrTarget) || got != (Target{}) {
			t.Errorf("ParseTarget(%q) = %+v, %v, want ErrTarget", s, got, err)
		}
	}
}

func FuzzTarget(f *testing.F) {
	for _, s := range []string{"vsock:3", "vsock:3:1021", "vsock-mux:/a:1:2", "vsock-mux:/a:", "unix:/a:1", "unix:@", "vsock:00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, err := ParseTarget(s)
		if err != nil {
			if got != (Target{}) || !errors.Is(err, ErrTarget) {
				t.Errorf("ParseTarget(%q) = %+v, %v", s, got, err)
			}
			return
		}
		// What String makes of it is the same target, and mostly the same text.
		again, err := ParseTarget(got.String())
		if err != nil || again != got {
			t.Errorf("ParseTarget(%q) = %+v, and of %q %+v, %v", s, got, got.String(), again, err)
		}
		if text := got.String(); text != s && text+":1022" != s {
			t.Errorf("ParseTarget(%q).String() = %q", s, text)
		}
	})
}

func TestParseProviderAddress(t *testing.T) {
	for s, want := range map[string]Target{
		"vsock:2":           {SchemeVsock, 2, "", 1021},
		"vsock:2:1021":      {SchemeVsock, 2, "", 1021},
		"vsock:2:7":         {SchemeVsock, 2, "", 7},
		"vsock:4294967294":  {SchemeVsock, 4294967294, "", 1021},
		"unix:/run/p":       {SchemeUnix, 0, "/run/p", 0},
		"unix:/run/p:1021":  {SchemeUnix, 0, "/run/p:1021", 0},
		"unix:/vsock-mux:1": {SchemeUnix, 0, "/vsock-mux:1", 0},
	} {
		got, err := ParseProviderAddress(s)
		if err != nil || got != want {
			t.Errorf("ParseProviderAddress(%q) = %+v, %v, want %+v", s, got, err, want)
		}
	}
	for s, want := range map[string]string{
		"":                "want vsock:CID[:PORT] or unix:PATH",
		"2":               "want vsock:CID[:PORT] or unix:PATH",
		"tcp:1:2":         "want vsock:CID[:PORT] or unix:PATH",
		"vsock:":          "the CID is no number",
		"vsock:0":         "the CID is no number",
		"vsock:2:":        "the port is no number",
		"vsock:2:1022":    "port 1022 is an agent's",
		"vsock-mux:/v":    "want vsock:2",
		"vsock-mux:":      "want vsock:2",
		"vsock-mux:/v:80": "want vsock:2",
		"unix:":           "the path is empty",
		"unix:" + strings.Repeat("x", maxTargetLen): "longer than 4096 bytes",
	} {
		got, err := ParseProviderAddress(s)
		if !errors.Is(err, ErrTarget) || got != (Target{}) || !strings.Contains(err.Error(), want) {
			t.Errorf("ParseProviderAddress(%.20q) = %+v, %v, want %q", s, got, err, want)
		}
	}
}

func FuzzProviderAddress(f *testing.F) {
	for _, s := range []string{"vsock:2", "vsock:2:1021", "vsock:2:1022", "vsock-mux:/a:1", "unix:/a:1", "unix:@", "vsock:02"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, err := ParseProviderAddress(s)
		if err != nil {
			if got != (Target{}) || !errors.Is(err, ErrTarget) {
				t.Errorf("ParseProviderAddress(%q) = %+v, %v", s, got, err)
			}
			return
		}
		// What String makes of it means the same in both places, so that a
		// message may quote it.
		for _, parse := range []func(string) (Target, error){ParseProviderAddress, ParseTarget} {
			if again, err := parse(got.String()); err != nil || again != got {
				t.Errorf("ParseProviderAddress(%q) = %+v, and of %q %+v, %v", s, got, got.String(), again, err)
			}
		}
		if text := got.String(); got.Scheme == SchemeMux || text != s && text != s+":1021" {
			t.Errorf("ParseProviderAddress(%q).String() = %q", s, text)
		}
	})
}
