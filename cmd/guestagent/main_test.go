package main

import (
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/guestagent/guestagent/internal/agent/agenttest"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"guestagent": main})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		Cmds:                map[string]func(*testscript.TestScript, bool, []string){"smbios": smbios},
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
	})
}

// smbios ROOT STRING… gives the guest below ROOT those OEM strings.
func smbios(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: smbios ROOT STRING…")
	}
	ts.Check(agenttest.WriteSMBIOS(ts.MkAbs(args[0]), args[1:]...))
}
