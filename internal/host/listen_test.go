package host

import (
	"math"
	"strconv"
	"strings"
	"testing"
)

func showOwner(uid, gid *int) string {
	show := func(n *int) string {
		if n == nil {
			return "-"
		}
		return strconv.Itoa(*n)
	}
	return show(uid) + ":" + show(gid)
}

func TestParseOwner(t *testing.T) {
	for in, want := range map[string]string{
		"0": "0:-", "root": "0:-", "12:34": "12:34", ":34": "-:34", "root:34": "0:34", "4294967294": "4294967294:-",
	} {
		uid, gid, err := ParseOwner(in)
		if got := showOwner(uid, gid); err != nil || got != want {
			t.Errorf("ParseOwner(%q) = %s, %v, want %s", in, got, err, want)
		}
	}
	for _, in := range []string{"", ":", "0:", "-1", "0:-1", "4294967295", ":4294967295", "nobody-has-this-name", "0:nobody-has-this-name", "1:2:3"} {
		uid, gid, err := ParseOwner(in)
		if err == nil || uid != nil || gid != nil || !strings.Contains(err.Error(), strconv.Quote(in)) {
			t.Errorf("ParseOwner(%q) = %s, %v, want an error that names it", in, showOwner(uid, gid), err)
		}
	}
}

func FuzzParseOwner(f *testing.F) {
	f.Add("root:root")
	f.Add("12:34")
	f.Add(":4294967295")
	f.Fuzz(func(t *testing.T, in string) {
		uid, gid, err := ParseOwner(in)
		if (err == nil) == (uid == nil && gid == nil) {
			t.Errorf("ParseOwner(%q) = %s, %v", in, showOwner(uid, gid), err)
		}
		for _, id := range []*int{uid, gid} {
			if id != nil && (*id < 0 || int64(*id) >= math.MaxUint32) {
				t.Errorf("ParseOwner(%q) = %s: chown takes that for no change", in, showOwner(uid, gid))
			}
		}
	})
}
