package vm_test

import (
	"testing"

	"github.com/guestagent/guestagent/tests/vm"
	"github.com/guestagent/guestagent/tests/vm/vmtest"
)

// TestConsumer runs the tests of package consumer that need a real systemd.
func TestConsumer(t *testing.T) {
	vmtest.Each(t, func(t *testing.T, release vm.Release) {
		m := vmtest.StartContainer(t, vm.ContainerConfig{Image: vmtest.Image(t, release)})
		args := []string{"-test.run=^TestLive"}
		if release.Systemd < 260 {
			args = append(args, "-test.skip=^TestLiveRefreshOnReload$") // it is not there yet
		}
		vmtest.RunTests(t, m, vmtest.TestConfig{
			Package: "github.com/guestagent/guestagent/consumer", Args: args, Env: []string{"GUESTAGENT_TEST_SYSTEMD=1"},
		})
	})
}
