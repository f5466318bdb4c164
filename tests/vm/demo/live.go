package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/guestagent/guestagent/internal/host"
)

// live shows what the host can do with a guest that runs. key is what demo.service has.
func (d *demo) live(ctx context.Context, key string) error {
	registry, err := json.Marshal(map[string]string{"target": "vsock-mux:" + d.guest.VsockPath()})
	if err != nil {
		return err
	}
	good, bad, signing := newKey(), "none-"+rand.Text(), newKey()
	if err := os.Mkdir(filepath.Join(d.dir, "vms"), 0o700); err != nil {
		return err
	}
	for name, content := range map[string]string{
		"vms/web.json": string(registry),
		"good":         good,
		"bad":          bad,
		"signing":      signing,
	} {
		if err := os.WriteFile(filepath.Join(d.dir, name), []byte(content), 0o600); err != nil {
			return err
		}
	}
	d.say("The host calls the guest web. In vms/web.json it says: %s", registry)
	if err := d.rotate(ctx, key, good, bad); err != nil {
		return err
	}
	return d.wait(ctx, signing)
}

// rotate changes the key under a running service, and then once more, to what is none. key is what it has before.
func (d *demo) rotate(ctx context.Context, key, good, bad string) error {
	if err := d.onHost(ctx, host.StatusDone, "push", "web", "--revision=2", "--refresh=auto", "api-key:good"); err != nil {
		return err
	}
	said := []string{has("api-key", key), has("api-key", good)}
	if err := d.journal(ctx, "demo.service", said...); err != nil {
		return err
	}
	if _, err := d.list(ctx, "api-key", "2", "demo.service"); err != nil {
		return err
	}
	d.say("The running service has the new key in place of that of the OEM string: both say SHA-256 %s", digest(good))

	d.say("The next key is none, which the service notices only at work: the gate has the guest watch it")
	// That the gate is long costs nothing: it is over when the service fails.
	if err := d.onHost(ctx, host.StatusRolledBack, "push", "web", "--revision=3", "--refresh=auto", "--gate=30s", "api-key:bad"); err != nil {
		return err
	}
	said = append(said, has("api-key", bad), "api-key is no key: it does not begin with key-", has("api-key", good))
	if err := d.journal(ctx, "demo.service", said...); err != nil {
		return err
	}
	list, err := d.list(ctx, "api-key", "2", "demo.service")
	if err != nil {
		return err
	}
	if len(list.Rejected) != 1 || !slices.Equal(list.Rejected[0].Names, []string{"api-key"}) {
		return fmt.Errorf("listing the guest: the sets that were rolled back are %+v, want one of api-key", list.Rejected)
	}
	d.say("The service runs with the key before: both say SHA-256 %s. The guest does not take the bad one again:", digest(good))
	return d.onHost(ctx, host.StatusFailed, "push", "web", "--revision=4", "api-key:bad")
}

// wait has a service start before its key is there.
func (d *demo) wait(ctx context.Context, key string) error {
	d.say("Another service wants a key that is not there yet. It loads it over the agent's socket, and so it waits")
	if err := d.inGuest(ctx, "systemctl cat signer.service"); err != nil {
		return err
	}
	const start = "systemctl start signer.service"
	d.say("In the guest, in the background: %s", start)
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	started := make(chan error, 1)
	wg.Go(func() {
		_, err := d.run(ctx, start)
		started <- err
	})
	if err := d.waiting(ctx, "signer.service", "signing-key", started); err != nil {
		return err
	}
	if err := d.onHost(ctx, host.StatusDone, "list", "web"); err != nil {
		return err
	}
	if err := d.onHost(ctx, host.StatusDone, "push", "web", "--revision=1", "signing-key:signing"); err != nil {
		return err
	}
	if err := <-started; err != nil {
		return err
	}
	if err := d.journal(ctx, "signer.service", has("signing-key", key)); err != nil {
		return err
	}
	if _, err := d.list(ctx, "signing-key", "1", "signer.service"); err != nil {
		return err
	}
	d.say("The service started when its key came: both say SHA-256 %s", digest(key))
	return nil
}
