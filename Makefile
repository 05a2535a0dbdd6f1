# hako: see README.md for the two commands that matter: make quickstart, make test.
GO      ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo 0.1.0-dev)
PREFIX  ?= /usr/local
GOARCH  ?= $(shell $(GO) env GOARCH)
COMMIT  ?= $(shell git rev-parse HEAD 2>/dev/null)
LDFLAGS  = -s -w -X github.com/hako-engine/hako/internal/version.Version=$(VERSION) -X github.com/hako-engine/hako/internal/version.Commit=$(COMMIT)
export CGO_ENABLED = 0

BINARIES = hako hakod hako-shim hako-oci
DEMO     = demo/image/demo-$(GOARCH).tar.gz

.PHONY: all build build-all demo test test-race test-security test-vm test-vm-arm64 test-powercut lint bench fuzz install uninstall man quickstart clean help

all: build

build: $(BINARIES:%=bin/%) bin/containerd-shim-hako-v2 ## the four binaries, into bin/

# The Go tool knows better than make what has changed, so it is always asked.
.PHONY: FORCE
# A copy, as an installed program is one, starts a tenth faster than what the linker has
# written through a mapping: the page cache keeps it in large pieces.
bin/%: FORCE $(DEMO)
	$(GO) build -trimpath -tags 'demo_image nri_no_wasm grpcnotrace' -ldflags '$(LDFLAGS)' -o $@ ./cmd/$*
	@cp $@ $@.copy && mv $@.copy $@

bin/hako-oci: LDFLAGS += -E main.entry # see cmd/hako-oci/entry_amd64.s

bin/containerd-shim-hako-v2: bin/hako-shim
	ln -sf hako-shim $@

build-all: ## everything for both architectures, without keeping it
	for arch in amd64 arm64; do GOARCH=$$arch $(GO) build -o /dev/null ./... && GOARCH=$$arch $(GO) vet ./cmd/... || exit 1; done

demo: $(DEMO) ## the image that hako load --demo loads
$(DEMO): $(wildcard demo/*.go demo/*/*.go)
	$(GO) run ./demo/build -arch $(GOARCH) -o $@

quickstart: ## README command 1: run containers from scratch, on a daemon of its own
	@GO='$(GO)' MAKE='$(MAKE)' scripts/quickstart.sh

test: $(DEMO) ## README command 2: unit, golden, integration (as root) and rooms tests
	@GO='$(GO)' scripts/test.sh

test-race: ## Go's race detector over the daemon, its shims and the command line; as root; needs a C compiler
	CGO_ENABLED=1 $(GO) test -race -p 1 -timeout 1h ./engine/... ./shim/... ./store/... ./snapshot/... ./image/... ./network/... ./api/... ./internal/... ./cli/... ./cmd/hakod ./cmd/hako

lint: ## formatting, vet, staticcheck, shell scripts
	@out=$$(gofmt -l $$(git ls-files '*.go')); [ -z "$$out" ] || { echo "not formatted:"; echo "$$out"; exit 1; }
	$(GO) vet ./...
	GOARCH=arm64 $(GO) vet ./oci/... ./shim/... ./network/...
	$(GO) run honnef.co/go/tools/cmd/staticcheck@v0.8.2 ./...
	@if command -v shellcheck >/dev/null; then shellcheck $$(git ls-files '*.sh' .ci/run); else echo "shellcheck is not installed: shell scripts were not checked"; fi

# make test runs the same battery with 50 starts for each race.
SECURITY_STARTS ?= 2000
test-security: ## the battery of published escapes, as root, with many starts for each race
	HAKO_SECURITY_STARTS=$(SECURITY_STARTS) $(GO) test -count=1 -timeout 2h -v ./test/security

test-vm: build ## the runtime's tests in a VM: Debian's kernel, cgroup v2, AppArmor, systemd
	@GO='$(GO)' test/vm/suite.sh
	@GO='$(GO)' MODES=systemd RUN='TestSystemdDriver|TestAppArmor' test/vm/suite.sh ./test/integration
	@GO='$(GO)' MODES=minimal RUN='TestErofsSuite/^[^1]|TestLoopDevices' test/vm/suite.sh ./snapshot # loop devices; not 128 of them

test-vm-arm64: ## the runtime's tests in a VM of arm64: Debian's kernel, cgroup v2
	@GO='$(GO)' ARCH=arm64 test/vm/suite.sh ./oci/... ./cmd/hako-oci ./internal/longoverlay

POWERCUTS ?= 100
FLUSHES   ?= 1200
# erofs needs a newer kernel: make test-powercut SNAPSHOTTER=erofs KERNEL=backports
SNAPSHOTTER ?= overlayfs
test-powercut: build ## cut the power of a VM that hako works in: at random, and at every flush of one run
	$(GO) build -ldflags '-s -w' -o bin/load ./test/chaos/load
	$(GO) build -o bin/powercut ./test/powercut
	bin/powercut kill -n $(POWERCUTS) -v -snapshotter $(SNAPSHOTTER)
	bin/powercut replay -flushes $(FLUSHES) -v -snapshotter $(SNAPSHOTTER)

bench: build ## benchmarks beside the code, then against the peers that are installed
	$(GO) test -run '^$$' -bench . -benchtime 1s ./...
	test/bench/all.sh

fuzz: ## every fuzz target for 30 seconds
	scripts/fuzz.sh

man: bin/hako bin/hako-oci ## the manual pages, into bin/man
	mkdir -p bin/man && bin/hako completion man bin/man && bin/hako-oci completion man bin/man

SHARE = $(DESTDIR)$(PREFIX)/share
install: build man ## into $(PREFIX)
	install -d $(DESTDIR)$(PREFIX)/bin $(SHARE)/man/man1 $(SHARE)/bash-completion/completions $(SHARE)/zsh/site-functions $(SHARE)/fish/vendor_completions.d
	install -m 0755 $(BINARIES:%=bin/%) $(DESTDIR)$(PREFIX)/bin
	ln -sf hako-shim $(DESTDIR)$(PREFIX)/bin/containerd-shim-hako-v2
	install -m 0644 bin/man/*.1 $(SHARE)/man/man1
	for b in hako hako-oci; do \
	  bin/$$b completion bash > $(SHARE)/bash-completion/completions/$$b && bin/$$b completion zsh > $(SHARE)/zsh/site-functions/_$$b && \
	  bin/$$b completion fish > $(SHARE)/fish/vendor_completions.d/$$b.fish || exit 1; done

uninstall: ## what install has put there
	rm -f $(BINARIES:%=$(DESTDIR)$(PREFIX)/bin/%) $(DESTDIR)$(PREFIX)/bin/containerd-shim-hako-v2 $(SHARE)/man/man1/hako.1 $(SHARE)/man/man1/hako-*.1
	for b in hako hako-oci; do rm -f $(SHARE)/bash-completion/completions/$$b $(SHARE)/zsh/site-functions/_$$b $(SHARE)/fish/vendor_completions.d/$$b.fish; done

clean: ## without bin/ and the demo image
	rm -rf bin demo/image/*.tar.gz

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14
