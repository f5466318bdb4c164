//go:build !linux

package agent

import (
	"context"
	"errors"
)

func (a *Agent) askConfidential(context.Context) (string, error) { return "", errors.ErrUnsupported }
