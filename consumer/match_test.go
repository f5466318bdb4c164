package consumer

import (
	"reflect"
	"testing"
)

func TestLoads(t *testing.T) {
	const store, socket = "/run/credstore", "/run/guestagent/credentials.sock"
	for _, tt := range []struct {
		name     string
		settings settings
		names    []string
		want     []Load
	}{
		{"nothing", settings{}, []string{"a"}, nil},
		{"no names", settings{load: []loadCredential{{"a", "a"}}, imports: []importCredential{{"*", ""}}}, nil, nil},
		{"bare name", settings{load: []loadCredential{{"a", "a"}}}, []string{"a", "b"}, []Load{{"a", "a", WayFile}}},
		{"bare name, renamed", settings{load: []loadCredential{{"x", "a"}, {"a", "b"}}}, []string{"a"}, []Load{{"a", "x", WayFile}}},
		{"one file twice", settings{load: []loadCredential{{"y", "a"}, {"x", store + "/a"}}}, []string{"a"}, []Load{{"a", "x", WayPath}, {"a", "y", WayFile}}},
		{"full path", settings{load: []loadCredential{{"x", store + "/a"}, {"y", "/etc/a"}, {"z", store + "/sub/a"}}}, []string{"a"}, []Load{{"a", "x", WayPath}}},
		{"full path, not clean", settings{load: []loadCredential{{"x", "/run//credstore/./a"}}}, []string{"a"}, []Load{{"a", "x", WayPath}}},
		{"full path with a dot", settings{load: []loadCredential{{"x", store + "/.a"}}}, []string{".a"}, []Load{{".a", "x", WayPath}}},
		{"folder", settings{load: []loadCredential{{"x", store + "/"}}}, []string{"a", ".b"}, []Load{{"a", "x_a", WayPath}}},
		{"another folder", settings{load: []loadCredential{{"x", "/run"}, {"y", store + "/.guestagent"}}}, []string{"a", ".guestagent"}, []Load{{".guestagent", "y", WayPath}}},
		{"folder and ID", settings{load: []loadCredential{{"x", store}, {"x_a", "/etc/a"}}}, []string{"a", "b"}, []Load{{"b", "x_b", WayPath}}},
		{"socket", settings{load: []loadCredential{{"a", socket}, {"b", "/run/other.sock"}}}, []string{"a", "b"}, []Load{{"a", "a", WaySocket}}},
		{"import", settings{imports: []importCredential{{"a", ""}}}, []string{"a", "ab"}, []Load{{"a", "a", WayImport}}},
		{"import, glob", settings{imports: []importCredential{{"a*", ""}}}, []string{"a", "ab", "b"}, []Load{{"a", "a", WayImport}, {"ab", "ab", WayImport}}},
		{"import, all", settings{imports: []importCredential{{"*", ""}}}, []string{"a", ".b"}, []Load{{"a", "a", WayImport}}},
		{"import, glob with a dot", settings{imports: []importCredential{{".b*", ""}}}, []string{"a", ".b.c"}, []Load{{".b.c", ".b.c", WayImport}}},
		{"import, renamed", settings{imports: []importCredential{{"a", "x"}, {"b.*", "y."}}}, []string{"a", "b.c"}, []Load{{"a", "x", WayImport}, {"b.c", "y.c", WayImport}}},
		{"import, two names", settings{imports: []importCredential{{"a*", "x"}, {"a*", ""}}}, []string{"ab"}, []Load{{"ab", "ab", WayImport}, {"ab", "xb", WayImport}}},
		{"import, first wins", settings{imports: []importCredential{{"a", "x"}, {"b", "x"}}}, []string{"b", "a"}, []Load{{"a", "x", WayImport}}},
		{
			"ID before import",
			settings{load: []loadCredential{{"a", "/etc/a"}, {"b", "b"}}, imports: []importCredential{{"*", ""}}},
			[]string{"a", "b", "c"},
			[]Load{{"b", "b", WayFile}, {"c", "c", WayImport}},
		},
		{"environment", settings{environments: []string{store + "/a", "/etc/b", "a"}}, []string{"a", "b"}, []Load{{"a", "", WayEnvironment}}},
		{"environment, glob", settings{environments: []string{store + "/*.env"}}, []string{"a.env", "b", ".c.env"}, []Load{{"a.env", "", WayEnvironment}}},
		{"environment, folder glob", settings{environments: []string{"/run/cred*/?"}}, []string{"a", "ab"}, []Load{{"a", "", WayEnvironment}}},
		{"environment, class", settings{environments: []string{store + "/[!b]", store + "/[^b]"}}, []string{"a", "b"}, []Load{{"a", "", WayEnvironment}}},
		{"environment, bad glob", settings{environments: []string{store + "/[a"}}, []string{"a"}, nil},
		{"environment, own folder", settings{environments: []string{store + "/.*", store + "/.guestagent/a"}}, []string{"a"}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := tt.settings.loads(tt.names, testConfig); !reflect.DeepEqual(got, tt.want) {
				t.Errorf("loads(%q) = %v, want %v", tt.names, got, tt.want)
			}
		})
	}
}

func TestSocketNames(t *testing.T) {
	s := settings{load: []loadCredential{{"b", "/run/guestagent//credentials.sock"}, {"x", "/run/x"}, {"a", "/run/guestagent/credentials.sock"}}}
	if got, want := s.socketNames(testConfig), []string{"b", "a"}; !reflect.DeepEqual(got, want) {
		t.Errorf("socketNames() = %q, want %q", got, want)
	}
}

func TestStatusString(t *testing.T) {
	for _, tt := range []struct {
		status Status
		want   string
	}{
		{Status{}, "unknown"},
		{Status{ActiveState: "active", SubState: "running", Result: "success"}, "active (running)"},
		{Status{ActiveState: "inactive", SubState: "dead", Result: "success", ExecMainCode: 1}, "inactive (dead)"},
		{Status{ActiveState: "failed", SubState: "failed", Result: "exit-code", ExecMainCode: 1, ExecMainStatus: 1}, "failed (result exit-code, exit status 1)"},
		{Status{ActiveState: "failed", SubState: "failed", Result: "exit-code", ExecMainCode: 1, ExecMainStatus: 243}, "failed (result exit-code, exit status 243/CREDENTIALS)"},
		{Status{ActiveState: "failed", SubState: "failed", Result: "signal", ExecMainCode: 2, ExecMainStatus: 9}, "failed (result signal, killed by signal 9)"},
		{Status{ActiveState: "failed", SubState: "failed", Result: "core-dump", ExecMainCode: 3, ExecMainStatus: 6}, "failed (result core-dump, dumped core by signal 6)"},
		{Status{ActiveState: "failed", SubState: "failed", Result: "timeout"}, "failed (result timeout)"},
		{
			Status{ActiveState: "activating", SubState: "auto-restart", Result: "exit-code", ExecMainCode: 1, ExecMainStatus: 2},
			"activating (auto-restart, result exit-code, exit status 2)",
		},
	} {
		if got := tt.status.String(); got != tt.want {
			t.Errorf("%#v.String() = %q, want %q", tt.status, got, tt.want)
		}
	}
}
