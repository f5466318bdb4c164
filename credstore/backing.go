package credstore

// A Backing is what a folder's content lies on.
type Backing struct {
	// FSType is the file system's type as mount(8) calls it, or its magic
	// number in hexadecimal where the store does not know it.
	FSType string
	// Swappable is true unless it is certain that the content never reaches a
	// disk: ramfs never swaps, tmpfs does not with the option noswap (Linux
	// 6.4). Everything else counts as swappable.
	Swappable bool
}

// BackingOf says what folder dir lies on.
func BackingOf(dir string) (Backing, error) { return backing(dir) }
