//go:build !linux

package agent

import (
	"errors"
	"os"
	"time"
)

const pid1Timeout = 10 * time.Second

func (credentials) watchStore() {}

func dup(*os.File) (*os.File, error) { return nil, errors.ErrUnsupported }
