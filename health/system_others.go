//go:build !linux

package health

import "errors"

func statFS(string) (fileSystem, error) { return fileSystem{}, errors.ErrUnsupported }

func openTrigger(string, []stall) (trigger, error) { return nil, errors.ErrUnsupported }
