// Package vsockrpc is Varlink over any net.Conn: a server and a client for
// AF_VSOCK, for the Unix sockets by which VMMs expose vsock (vsock-mux), and
// for plain Unix sockets. It has the interfaces io.guestagent.Credentials and
// io.guestagent.Health of a guest and io.guestagent.Provider of a host as Go
// types, and the policy that says which peer may talk to the agent.
//
// A message is one JSON object and a NUL byte. The package guarantees that a
// peer does not choose how much is read: messages, connections, nesting, names
// and lists are bounded, everything has a deadline, and past a limit nothing
// more is buffered. JSON is decoded by code of our own, from the message buffer
// straight into where it belongs, because encoding/json leaves copies of values
// and takes duplicate keys. What does not fit is refused by position and path
// of keys; no error and no log line has content of a message. Buffers that held
// a message are overwritten afterwards, which is best effort: the kernel has
// its own.
//
// A [Server] answers nobody until it is told whom: without Authorize it closes
// every connection unread. [Policy] decides by what the kernel says of the
// peer, never by what the peer sends.
//
// The package has no policy on credentials, does not touch files but sockets,
// and knows nothing of VM names. It encrypts nothing: whoever runs the host
// sees the memory of its guests anyhow.
//
// It trusts the kernel's addresses. A server trusts no message, of an
// authorised peer neither. A client does not trust the guest: replies are
// bounded, and what an error quotes of them has its control characters
// escaped.
package vsockrpc
