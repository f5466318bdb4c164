// Package host is the host's side: which guests there are, what is to be put
// into them, and doing that to many of them, some at a time.
//
// It guarantees that a value is a secret.Value from its file to the wire, and
// that no error has one: what stands where a name belongs is not quoted before
// it can be one. What a guest says is bounded by vsockrpc, and escaped where
// an error quotes it; a [Result] has it as it came, and whoever shows it
// escapes it.
//
// The package prints nothing, and ends no program: [Status] says with which
// status one should.
//
// It trusts the files and folders that it is pointed to, and no guest.
package host
