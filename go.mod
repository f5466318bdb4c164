module github.com/guestagent/guestagent

go 1.26.0

require (
	github.com/digitalocean/go-smbios v0.0.0-20180907143718-390a4f403a8e
	github.com/godbus/dbus/v5 v5.2.4
	github.com/rogpeppe/go-internal v1.16.0
	golang.org/x/sys v0.49.0
)

require (
	github.com/google/go-cmp v0.7.0 // indirect
	golang.org/x/tools v0.26.0 // indirect
)
