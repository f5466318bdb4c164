package host

import (
	"reflect"
	"strings"
	"unicode/utf8"

	"github.com/guestagent/guestagent/vsockrpc"
)

// The bounds of what is kept of a guest's report. A provider's status, which has
// one in it, is at most maxStatus bytes.
const (
	maxKept   = 512 << 10
	maxStatus = 1 << 20
	// maxKeptList and maxKeptText bound a list and a text, in bytes, of a report
	// that is larger than maxKept.
	maxKeptList = 64
	maxKeptText = 256
)

// trim returns a report of at most maxKept bytes: r, or a copy in which the
// consumers are left out and, where that is not enough, lists and texts are cut.
func trim(r *vsockrpc.Report) (kept *vsockrpc.Report, trimmed bool) {
	if r.Size() <= maxKept {
		return r, false
	}
	c := *r
	c.Entries = append([]vsockrpc.Entry(nil), r.Entries...)
	for i := range c.Entries {
		c.Entries[i].Consumers = nil
	}
	// Escaping can make a text six times as long, and a list can be in a list.
	for list, text := maxKeptList, 1<<30; c.Size() > maxKept; list, text = list/2, maxKeptText {
		c, _ = cut(reflect.ValueOf(c), list, text).Interface().(vsockrpc.Report)
	}
	return &c, true
}

// cut copies v with its lists and texts cut. What it is made of is what a report
// is made of.
func cut(v reflect.Value, list, text int) reflect.Value {
	switch v.Kind() {
	case reflect.String:
		s := v.String()
		if len(s) > text {
			for text > 0 && !utf8.RuneStart(s[text]) {
				text--
			}
			s = strings.Clone(s[:text]) // lets go of the rest
		}
		return reflect.ValueOf(s).Convert(v.Type())
	case reflect.Slice:
		if v.IsNil() {
			return v
		}
		c := reflect.MakeSlice(v.Type(), min(v.Len(), list), min(v.Len(), list))
		for i := range c.Len() {
			c.Index(i).Set(cut(v.Index(i), list, text))
		}
		return c
	case reflect.Pointer:
		if v.IsNil() {
			return v
		}
		c := reflect.New(v.Type().Elem())
		c.Elem().Set(cut(v.Elem(), list, text))
		return c
	case reflect.Struct:
		c := reflect.New(v.Type()).Elem()
		for i := range v.NumField() {
			c.Field(i).Set(cut(v.Field(i), list, text))
		}
		return c
	}
	return v
}
