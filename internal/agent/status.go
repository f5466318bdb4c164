package agent

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"time"

	"github.com/guestagent/guestagent/health"
	"github.com/guestagent/guestagent/vsockrpc"
)

// askTimeout bounds the wait for the agent that serves.
const askTimeout = 10 * time.Second

// Ask is Status, with the verdict and the reasons of the agent that serves.
// Where that does not answer, the report says so and is good for the rest.
func (a *Agent) Ask(ctx context.Context) (*Report, error) {
	r, err := a.Status()
	if err != nil {
		return nil, err
	}
	socket := a.path(pathLocalSocket)
	if _, err := os.Stat(socket); errors.Is(err, fs.ErrNotExist) {
		return r, nil // nobody serves: in an image, or with the units turned off
	}
	h, err := askHealth(ctx, socket)
	if err != nil {
		r.reason(health.Unknown, "systemctl status guestagent.service", "the agent does not say how the guest is: %v", err)
		return r, nil
	}
	r.Verdict, r.Reasons = h.Verdict, make([]Reason, 0, len(h.Reasons))
	for _, n := range h.Reasons {
		r.Reasons = append(r.Reasons, Reason{Code: health.Code(n.Code), Detail: n.Detail, Hint: n.Hint, Verdict: n.Verdict, Unit: n.Unit, Credential: n.Credential})
	}
	return r, nil
}

func askHealth(ctx context.Context, socket string) (*vsockrpc.Report, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	c, err := vsockrpc.Dial(ctx, vsockrpc.Target{Scheme: vsockrpc.SchemeUnix, Path: socket})
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return vsockrpc.Health{Client: c}.Get(ctx)
}
