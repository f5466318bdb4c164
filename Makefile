# guestagent. `make help` lists what there is.

SHELL := bash
.DELETE_ON_ERROR:
.SHELLFLAGS := -eu -o pipefail -c

VERSION ?= 0.1.0-dev
PREFIX  ?= /usr
UNITDIR ?= $(PREFIX)/lib/systemd/system
ZSHDIR  ?= $(PREFIX)/share/zsh/site-functions
DESTDIR ?=
# Where `make deb` puts the packages.
DIST    ?= dist
# The guests that `make test` boots, in VMs and in containers: trixie, bookworm, sid, several with commas, or all.
VM      ?= trixie
# Only the tests that are given it boot guests.
unexport VM
# How long each fuzzer runs in `make fuzz`.
FUZZTIME ?= 1m

GOBUILD := CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=$(VERSION)"
# The guestctl of this machine, which may not be the one that is built.
GUESTCTL := GOOS= GOARCH= CGO_ENABLED=0 go run -ldflags "-X main.version=$(VERSION)" ./cmd/guestctl
TOOL    := go tool -modfile=tools/go.mod

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | sort | while IFS=$$'\t' read -r t d; do printf '  make %-16s %s\n' "$$t" "$$d"; done
	@printf '\nvariables: VM=%s DESTDIR= MIRROR= (Debian mirror of the guests) DEPS=1 (install missing Debian packages)\n' '$(VM)'

.PHONY: go
go:
	@tools/check-go

.PHONY: build
build: go ## build bin/guestagent and bin/guestctl
	$(GOBUILD) -o bin/guestagent ./cmd/guestagent
	$(GOBUILD) -o bin/guestctl ./cmd/guestctl

.PHONY: install
install: build ## install the binary and the units below DESTDIR
	install -D -m 0755 bin/guestagent '$(DESTDIR)$(PREFIX)/bin/guestagent'
	for unit in systemd/*.*; do \
	  sed 's|/usr/bin/guestagent|$(PREFIX)/bin/guestagent|' "$$unit" | install -D -m 0644 /dev/stdin '$(DESTDIR)$(UNITDIR)'/"$${unit##*/}"; done
	install -D -m 0644 -t '$(DESTDIR)$(PREFIX)/share/guestagent' systemd/optional/*.conf

.PHONY: install-guestctl
install-guestctl: build ## install guestctl, its units, alerts, man pages and completions below DESTDIR
	install -D -m 0755 bin/guestctl '$(DESTDIR)$(PREFIX)/bin/guestctl'
	for unit in systemd/host/*.*; do \
	  sed 's|/usr/bin/guestctl|$(PREFIX)/bin/guestctl|' "$$unit" | install -D -m 0644 /dev/stdin '$(DESTDIR)$(UNITDIR)'/"$${unit##*/}"; done
	install -D -m 0644 dist/prometheus/alerts.yml '$(DESTDIR)$(PREFIX)/share/guestctl/alerts.yml'
	install -d '$(DESTDIR)$(PREFIX)/lib/systemd/varlink-bridges' '$(DESTDIR)$(PREFIX)/share/man/man1'
	for name in vsock vsock-mux; do ln -sf ../../../bin/guestctl '$(DESTDIR)$(PREFIX)/lib/systemd/varlink-bridges'/"$$name"; done
	$(GUESTCTL) man '$(DESTDIR)$(PREFIX)/share/man/man1'
	gzip -9nf '$(DESTDIR)$(PREFIX)'/share/man/man1/guestctl*.1
	$(GUESTCTL) completion bash | install -D -m 0644 /dev/stdin '$(DESTDIR)$(PREFIX)/share/bash-completion/completions/guestctl'
	$(GUESTCTL) completion zsh | install -D -m 0644 /dev/stdin '$(DESTDIR)$(ZSHDIR)/_guestctl'
	$(GUESTCTL) completion fish | install -D -m 0644 /dev/stdin '$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/guestctl.fish'

.PHONY: deb
deb: go ## build Debian packages of guestagent and guestctl
	tools/deb '$(VERSION)' '$(DIST)'

.PHONY: demo
demo: go ## boot a VM, see a secret from an OEM string reach a service, rotate it, and see a bad one rolled back; and a second VM ask its host
	@tools/deps vm
	@go run ./tests/vm/demo

.PHONY: test
test: go ## run every test, those in VMs and containers too
	@tools/deps vm nix race prometheus
	go test -shuffle=on ./...
	go test -race -short -shuffle=on ./...
	tests/nix/check
	rm -rf tests/vm/artifacts
	VM='$(VM)' GUESTAGENT_VM_ARTIFACTS='$(CURDIR)/tests/vm/artifacts' go test -count=1 -timeout 60m -v ./tests/vm
	@cat tests/vm/artifacts/LEFT-OUT 2>/dev/null || true

.PHONY: vendor-hash
vendor-hash: go ## write the hash of the Nix packages' dependencies anew, after a change of go.mod
	@tools/deps nix
	@hash=$$(tests/nix/vendor-hash) && sed -i "s|^  vendorHash = \".*\";\$$|  vendorHash = \"$$hash\";|" nixos/program.nix
	@grep -n 'vendorHash = ' nixos/program.nix

.PHONY: lint
lint: go ## run the linters
	@tools/deps lint
	$(TOOL) golangci-lint run ./...
	GOOS=darwin go vet ./...
	go mod verify
	go mod tidy -diff
	go fix -diff ./...
	shellcheck .ci/run tools/check-go tools/deb tools/deps tests/nix/check tests/nix/eval tests/nix/reference tests/nix/render tests/nix/vendor-hash tests/vm/trim.sh

.PHONY: fmt
fmt: go ## format the Go files
	$(TOOL) golangci-lint fmt ./...

.PHONY: bench
bench: go ## run the benchmarks
	go test -run '^$$' -bench . -benchmem ./smbios ./vsockrpc ./credsocket ./consumer ./health ./internal/... ./cmd/guestagent ./tests/fleet

.PHONY: fuzz
fuzz: go ## run each fuzzer for FUZZTIME
	@grep -rlE '^func Fuzz' --include='*_test.go' . | while read -r f; do \
	  sed -n 's/^func \(Fuzz[A-Za-z]*\).*/\1/p' "$$f" | while read -r name; do \
	    echo "$$(dirname "$$f") $$name"; go test -run '^$$' -fuzz "^$$name\$$" -fuzztime '$(FUZZTIME)' "$$(dirname "$$f")"; done; done

.PHONY: clean
clean: ## remove what was built here; the guests' images stay in the user's cache folder
	rm -rf bin dist/*.deb tests/vm/artifacts
