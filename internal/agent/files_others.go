//go:build !linux

package agent

import (
	"context"
	"errors"
	"os"
)

const namesChange, filesChange = 0, 0

func inotify(context.Context, string, uint32, chan<- struct{}) error { return errors.ErrUnsupported }

func dup(*os.File) (*os.File, error) { return nil, errors.ErrUnsupported }
