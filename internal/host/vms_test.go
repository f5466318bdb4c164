package host

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/guestagent/guestagent/vsockrpc"
)

// registry makes a registry of files, by folder and name.
func registry(t *testing.T, files map[string]string) Registry {
	t.Helper()
	root := t.TempDir()
	r := Registry{Dirs: []string{filepath.Join(root, "etc"), filepath.Join(root, "run")}}
	for file, content := range files {
		file = filepath.Join(root, file)
		if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

func showGuests(guests []Guest) string {
	words := make([]string, len(guests))
	for i, g := range guests {
		words[i] = g.Name + "=" + g.Target.String()
	}
	return strings.Join(words, " ")
}

func TestRegistryList(t *testing.T) {
	r := registry(t, map[string]string{
		"etc/web.json": `{"target": "vsock:3"}`, "etc/db.json": `{"target": "vsock-mux:/run/db.sock"}`, "etc/notes": "x", "etc/.hidden.json": "x",
		"run/web.json": `{"target": "vsock:4"}`, "run/new.json": `{"target": "unix:/run/new.sock"}`,
	})
	guests, err := r.List()
	if got, want := showGuests(guests), "db=vsock-mux:/run/db.sock new=unix:/run/new.sock web=vsock:3"; err != nil || got != want {
		t.Errorf("List = %s, %v, want %s", got, err, want)
	}
	if guests, err := (Registry{Dirs: []string{filepath.Join(t.TempDir(), "missing")}}).List(); len(guests) != 0 || err != nil {
		t.Errorf("List of a missing folder = %v, %v, want nothing", guests, err)
	}
	if _, err := (Registry{}).All(); !errors.Is(err, ErrUnknownVM) {
		t.Errorf("All of nothing = %v, want %v", err, ErrUnknownVM)
	}

	// A file that is wrong does not let the second folder's stand in for it.
	r = registry(t, map[string]string{
		"etc/a.json": `{"target": "vsock:3"`, "etc/b.json": `{"target": "vsock:3", "x": 1}`, "etc/c.json": `{"target": "vsock:3"} x`,
		"etc/d.json": `{"target": "3"}`, "etc/-e.json": `{"target": "vsock:3"}`, "etc/f g.json": `{"target": "vsock:3"}`,
		"etc/h.json": `{"target": "vsock:3"}` + strings.Repeat(" ", maxVMFile), "etc/good.json": `{"target": "vsock:9"}`,
		"run/a.json": `{"target": "vsock:4"}`,
	})
	guests, err = r.List()
	if got, want := showGuests(guests), "good=vsock:9"; err == nil || got != want {
		t.Fatalf("List = %s, %v, want %s and an error", got, err, want)
	}
	for _, name := range []string{"a", "b", "c", "d", "-e", "f g", "h"} {
		if !strings.Contains(err.Error(), "/"+name+".json") {
			t.Errorf("List = %v, and says nothing of %s.json", err, name)
		}
	}
	if _, err := r.All(); err == nil {
		t.Error("All passed over files that are wrong")
	}
}

func TestResolve(t *testing.T) {
	r := registry(t, map[string]string{
		"etc/web1.json": `{"target": "vsock:3"}`, "etc/web2.json": `{"target": "vsock:4"}`, "etc/db.json": `{"target": "vsock:5"}`, "etc/alias.json": `{"target": "vsock:5"}`,
	})
	for list, want := range map[string]string{
		"db":                   "db=vsock:5",
		"web2,web1":            "web2=vsock:4 web1=vsock:3",
		"web*":                 "web1=vsock:3 web2=vsock:4",
		"web[2-3],web*":        "web2=vsock:4 web1=vsock:3",
		"vsock:9:7,db":         "vsock:9:7=vsock:9:7 db=vsock:5",
		"db,alias,vsock:5":     "db=vsock:5",
		"unix:/a,vsock-mux:/b": "unix:/a=unix:/a vsock-mux:/b=vsock-mux:/b",
		"vsock:5:1022":         "vsock:5:1022=vsock:5",
	} {
		guests, err := r.Resolve(list)
		if got := showGuests(guests); err != nil || got != want {
			t.Errorf("Resolve(%q) = %s, %v, want %s", list, got, err, want)
		}
	}
	for list, want := range map[string]error{
		"": ErrTargets, "web1,": ErrTargets, "api-key=hunter2": ErrTargets, "hunter2 x": ErrTargets, "web[hunter2": ErrTargets, "hunter2\x1b": ErrTargets,
		"api-key:hunter2": vsockrpc.ErrTarget, "vsock:hunter2": vsockrpc.ErrTarget, "-x": ErrTargets,
		"nosuch": ErrUnknownVM, "db,nosuch": ErrUnknownVM, "z*": ErrUnknownVM,
	} {
		guests, err := r.Resolve(list)
		if !errors.Is(err, want) || guests != nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("Resolve(%q) = %v, %v, want %v", list, guests, err, want)
		}
	}

	// A file that is wrong matters where it may be meant.
	r = registry(t, map[string]string{"etc/a.json": `{"target": "vsock:3"}`, "etc/bad.json": `x`})
	if guests, err := r.Resolve("a"); err != nil || showGuests(guests) != "a=vsock:3" {
		t.Errorf("Resolve(a) = %v, %v", guests, err)
	}
	for _, list := range []string{"*", "bad", "a,b*"} {
		if guests, err := r.Resolve(list); err == nil || guests != nil || !strings.Contains(err.Error(), "bad.json") {
			t.Errorf("Resolve(%q) = %v, %v, want an error of bad.json", list, guests, err)
		}
	}
}

func TestProviderOfVM(t *testing.T) {
	long := "/" + strings.Repeat("a", maxSocketPath)
	for in, want := range map[string]ProviderAddress{
		`{"target": "vsock:3"}`:                                                         {1021, "/run/guestagent/provide/web.sock"},
		`{"target": "unix:/a", "provider": {}}`:                                         {1021, "/run/guestagent/provide/web.sock"},
		`{"target": "vsock:3", "provider": {"port": 768}}`:                              {768, "/run/guestagent/provide/web.sock"},
		`{"target": "vsock:3", "provider": {"port": 1021}}`:                             {1021, "/run/guestagent/provide/web.sock"},
		`{"target": "vsock-mux:/a", "provider": {"port": 1}}`:                           {1, "/run/guestagent/provide/web.sock"},
		`{"target": "vsock-mux:/a", "provider": {"port": 4294967294, "socket": "/b"}}`:  {4294967294, "/b"},
		`{"target": "unix:/a", "provider": {"socket": "` + long[:maxSocketPath] + `"}}`: {1021, long[:maxSocketPath]},
	} {
		g, err := parseVM([]byte(in), "web")
		if err != nil || g.Provider != want {
			t.Errorf("parseVM(%q) = %v, %v, want %v", in, g.Provider, err, want)
		}
	}
	for in, want := range map[string]string{
		`{"target": "vsock:3", "provider": {"port": 1024}}`:             "not from 768 to 1021: any user",
		`{"target": "vsock:3", "provider": {"port": 767}}`:              "not from 768 to 1021: it could be taken",
		`{"target": "vsock:3", "provider": {"port": 1022}}`:             "is an agent's",
		`{"target": "vsock-mux:/a", "provider": {"port": 1022}}`:        "is an agent's",
		`{"target": "vsock:3", "provider": {"port": 1023}}`:             "not from 768 to 1021: 1022 is an agent's",
		`{"target": "vsock:3", "provider": {"port": 0}}`:                "from 1 to",
		`{"target": "vsock-mux:/a", "provider": {"port": 4294967295}}`:  "from 1 to",
		`{"target": "vsock-mux:/a", "provider": {"port": 4294967296}}`:  "should be like",
		`{"target": "vsock:3", "provider": {"port": 1021.5}}`:           "should be like",
		`{"target": "vsock:3", "provider": {"port": "1021"}}`:           "should be like",
		`{"target": "unix:/a", "provider": {"port": 1021}}`:             "leave it out",
		`{"target": "vsock:3", "provider": {"socket": ""}}`:             "absolute",
		`{"target": "vsock:3", "provider": {"socket": "a.sock"}}`:       "absolute",
		`{"target": "vsock:3", "provider": {"socket": "/"}}`:            "absolute",
		`{"target": "vsock:3", "provider": {"socket": "/a/../b"}}`:      "absolute",
		`{"target": "vsock:3", "provider": {"socket": "/a/"}}`:          "absolute",
		`{"target": "vsock:3", "provider": {"socket": "/a\u0000"}}`:     "absolute",
		`{"target": "vsock:3", "provider": {"socket": "` + long + `"}}`: "shorter",
		`{"target": "vsock:3", "provider": {"cid": 3}}`:                 "should be like",
		`{"target": "vsock:3", "provider": "1021"}`:                     "should be like",
		`{"target": "vsock:3", "cid": 3, "socket": "/a"}`:               "should be like",
	} {
		if g, err := parseVM([]byte(in), "web"); err == nil || g != (Guest{}) || !strings.Contains(err.Error(), want) {
			t.Errorf("parseVM(%q) = %v, %v, want an error with %q", in, g, err, want)
		}
	}

	guests, err := Registry{}.Resolve("vsock:9")
	if err != nil || guests[0].Provider != (ProviderAddress{Port: vsockrpc.DefaultProviderPort}) {
		t.Errorf("Resolve(vsock:9) = %v, %v, want a provider at port %d without a socket", guests, err, vsockrpc.DefaultProviderPort)
	}
}

func TestPathName(t *testing.T) {
	seen := map[string]string{}
	for path, want := range map[string]string{
		"/var/lib/microvms/web/notify.vsock": "var-lib-microvms-web-notify.vsock",
		"/run/vms/a.sock":                    "run-vms-a.sock",
		"/run/vms//./b.sock":                 "run-vms-b.sock",
		"/vsock":                             "vsock",
		"/a-b":                               `a\x2db`,
		"/a/b":                               "a-b",
		"/.a":                                `\x2ea`,
	} {
		got, err := PathName(path)
		if err != nil || got != want || seen[got] != "" {
			t.Errorf("PathName(%q) = %q, %v, want %q, and it is that of %q", path, got, err, want, seen[got])
		}
		seen[got] = path
	}
	t.Chdir("/")
	if got, err := PathName("run/v.sock"); err != nil || got != "run-v.sock" {
		t.Errorf("PathName of a relative path = %q, %v, want run-v.sock", got, err)
	}
}

func FuzzParseVM(f *testing.F) {
	f.Add(`{"target": "vsock:3"}`)
	f.Add(`{"target": "vsock-mux:/run/vm.sock:1022"}`)
	f.Add(`{"target": "unix:/run/vm.sock", "x": 1}`)
	f.Add(`{"target": "vsock:3"} {`)
	f.Add(`{"target": "vsock:3", "provider": {"port": 1021, "socket": "/run/web.sock"}}`)
	f.Add(`{"target": "vsock-mux:/a", "provider": {"port": 4294967294}}`)
	f.Fuzz(func(t *testing.T, in string) {
		g, err := parseVM([]byte(in), "vm")
		if err != nil {
			if g != (Guest{}) {
				t.Errorf("parseVM(%q) gives something with an error", in)
			}
			return
		}
		again, err := vsockrpc.ParseTarget(g.Target.String())
		if err != nil || again != g.Target {
			t.Errorf("parseVM(%q) = %v, which parses as %v, %v", in, g.Target, again, err)
		}
		if p := g.Provider; p.Port == 0 || g.Target.Scheme == vsockrpc.SchemeVsock && CheckProviderPort(p.Port) != nil || !filepath.IsAbs(p.Socket) {
			t.Errorf("parseVM(%q) has the provider %v", in, p)
		}
	})
}

func FuzzResolve(f *testing.F) {
	f.Add("web")
	f.Add("web*,vsock:3")
	f.Add("vsock-mux:/a:1,unix:/b,vsock:1:2")
	f.Add("[a-")
	f.Fuzz(func(t *testing.T, in string) {
		guests, err := Registry{}.Resolve(in)
		if (err == nil) == (len(guests) == 0) {
			t.Errorf("Resolve(%q) = %v, %v", in, guests, err)
		}
		for _, g := range guests {
			if !strings.Contains(in, g.Name) {
				t.Errorf("Resolve(%q) has %q", in, g.Name)
			}
		}
	})
}
