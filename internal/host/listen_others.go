//go:build !linux

package host

import (
	"errors"
	"fmt"
	"net"
)

// ListenLocal is for Linux.
func ListenLocal(path, _ string) (net.Listener, error) {
	return nil, fmt.Errorf("listening at %q: %w; run the provider on Linux", path, errors.ErrUnsupported)
}

type folder struct{ owner owner }

type folderError string

func (e folderError) Error() string { return string(e) }

func openFolder(string) (folder, error) {
	return folder{}, folderError("this system has no provider; run it on Linux")
}

func (folder) close() {}

func (folder) id(string) (fileID, error) { return fileID{}, errors.ErrUnsupported }

func (folder) removeIf(string, fileID) error { return errors.ErrUnsupported }

func (folder) listen(string) (*boundSocket, error) { return nil, errors.ErrUnsupported }

type liveID fileID

func (liveID) Error() string { return "another program listens there" }

func (*boundSocket) unpin() {}

func (*boundSocket) chown(owner) error { return errors.ErrUnsupported }
