//go:build !linux

package agent

import (
	"context"
	"errors"
	"os"
)

func inotify(context.Context, string, chan<- struct{}) error { return errors.ErrUnsupported }

func dup(*os.File) (*os.File, error) { return nil, errors.ErrUnsupported }
