package vsockrpc

import (
	"context"
	_ "embed" // the descriptions of the interfaces
	"maps"
	"slices"
)

// The descriptions of the interfaces, in Varlink's notation.
var (
	//go:embed org.varlink.service.varlink
	serviceDescription string
	//go:embed io.guestagent.varlink
	guestagentDescription string
)

const (
	serviceInterface    = "org.varlink.service"
	guestagentInterface = "io.guestagent"
)

var interfaceFields = NewFields("interface")

// ownInterfaces are what every server has.
func (s *Server) ownInterfaces() []Interface {
	return []Interface{
		{Name: serviceInterface, Description: serviceDescription, Methods: map[string]Handler{
			"GetInfo":                 s.getInfo,
			"GetInterfaceDescription": s.getInterfaceDescription,
		}},
		{Name: guestagentInterface, Description: guestagentDescription},
	}
}

func (s *Server) getInfo(_ context.Context, call *Call) error {
	if err := call.DecodeNone(); err != nil {
		return err
	}
	return call.Reply(EncodeFunc(func(e *Encoder) {
		e.String("vendor", s.Vendor)
		e.String("product", s.Product)
		e.String("version", s.Version)
		e.String("url", s.URL)
		e.Strings("interfaces", slices.Sorted(maps.Keys(s.methods)))
	}))
}

func (s *Server) getInterfaceDescription(_ context.Context, call *Call) error {
	d := call.Params()
	var name string
	d.Object(interfaceFields, func(string) { name = d.String(maxNameLen) })
	if err := d.End(); err != nil {
		return err
	}
	i := s.methods[name]
	if i == nil {
		if !validInterface(name) {
			return &DecodeError{Path: "interface", Problem: "not the name of an interface"}
		}
		return stringError(errInterfaceNotFound, "interface", name)
	}
	return call.Reply(EncodeFunc(func(e *Encoder) { e.String("description", i.Description) }))
}
