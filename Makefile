# Everything starts here, on a Debian 12 machine with Rust, make and apt; the rest is installed
# when it is missing (tests/deps.sh).
#
#   make demo       the whole way of an event, told as it goes; about a minute after the build
#   make test       all that is checked before a change goes in
#   make bench-buffer  accepting, draining, memory against this disk and mosquitto, and which targets
#                   hold; BENCH="--only accept,drain": some of it
#   make soak       the crash matrix twelve times over with a million events, 24,000 simulated days,
#                   1,200 power cuts and 2,000 calls that leave nothing behind; about an hour.
#                   ROUNDS=2: a sixth of the first three
#   make test-vm    virtual machines on cgroup v2, x86_64, aarch64 and armv7; ARCH="…" for some
#   make build      the release binary, target/release/neap
#   make bench-images   pulls against skopeo and umoci
#   make bench      neap beside crun, runc, podman and youki, and which targets hold; PEERS=1
#                   installs what is missing of them
#   make bench-http  calls through neap beside calls to the same server
#   make cross      static binaries for x86_64, aarch64 and armv7 in target/dist; ARCH="…" for some
#   make deb        Debian packages of them, in target/dist
#
#   make cross-check   starts each under emulation, and builds each twice to compare; ARCH="…"
#   make deb-check     installs, upgrades and purges the package in a Debian of its own
#
# Containers need root: demo and test ask sudo when they run as somebody else.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
CARGO ?= cargo
target := $(or $(CARGO_TARGET_DIR),target)

# The target's runner: cargo builds as this user and runs the tests as root.
ifneq ($(shell id -u),0)
host := $(shell rustc -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')
root_runner := CARGO_TARGET_$(host)_RUNNER="sudo --preserve-env"
endif

.PHONY: help
help:
	@sed -n 's/^#   //p' Makefile

.PHONY: deps
deps:
	@tests/deps.sh

.PHONY: build
build: deps
	$(CARGO) build --locked --release

# The dev profile, which the tests use too: it is there after one build, not two.
.PHONY: demo
demo: deps
	$(CARGO) build --locked --bin neap
	tests/demo/run.sh $(target)/debug/neap

.PHONY: test
test: deps
	@$(MAKE) --no-print-directory test-format test-lint test-cargo test-static
	@$(MAKE) --no-print-directory test-vm ARCH=x86_64
	@$(MAKE) --no-print-directory test-deny
	@if [ -s $(target)/tmp/unsteady.txt ]; then echo "make test: needed a second try: $$(tr '\n' ' ' <$(target)/tmp/unsteady.txt)"; fi
	@echo "make test: all passed"

.PHONY: test-format
test-format:
	$(CARGO) fmt --check

.PHONY: test-lint
test-lint:
	$(CARGO) clippy --locked --all-targets -- -D warnings

.PHONY: test-cargo
test-cargo:
	$(root_runner) CARGO="$(CARGO)" tests/cargo-test.sh
	@cat $(target)/tmp/kill-test.txt 2>/dev/null || true

.PHONY: bench-buffer
bench-buffer: build
	@mkdir -p $(target)/tmp
	CARGO_TARGET_TMPDIR=$(target)/tmp tests/bench/buffer.py $(or $(NEAP),$(target)/release/neap) $(BENCH)

# The matrix of faults and moments, the simulation and the disk that loses power, for about an hour:
# with 12 rounds a million events go through the matrix.
ROUNDS ?= 12
.PHONY: soak
soak: deps
	NEAP_TEST_CUTS=$$(($(ROUNDS) * 100)) \
	    $(root_runner) $(CARGO) test --locked --lib -- store::tests::faults:: --nocapture
	NEAP_MATRIX_ROUNDS=$(ROUNDS) NEAP_MATRIX_FORWARDS=3400 NEAP_SIMULATED_DAYS=$$(($(ROUNDS) * 2000)) \
	    NEAP_TEST_CALLS=2000 \
	    $(root_runner) $(CARGO) test --locked --test integration -- crash:: simulation:: calls_leave_no --nocapture \
	    --test-threads 16
	@cat $(target)/tmp/crash-*.txt

# The static binary of this machine: an executable of another C library than the tests'.
.PHONY: test-static
test-static:
	cross/build.sh x86_64
	cross/smoke.sh x86_64

# Guests on cgroup v2: Debian's kernels under software emulation, with the static binaries;
# ARCH="…" for some.
.PHONY: test-vm
test-vm: cross
	@tests/deps.sh $(if $(filter-out x86_64,$(or $(ARCH),all)),qemu-system-arm)
	@for arch in $(or $(ARCH),x86_64 aarch64 armv7); do tests/vm/run.sh $$arch || exit 1; done

# Pulls against other tools: figures, and which targets hold.
.PHONY: bench-images
bench-images: deps
	$(CARGO) build --locked --release
	tests/bench/images.sh $(target)/release/neap

# Calls to an http function beside calls to the same server; root, within five minutes.
.PHONY: bench-http
bench-http: build
	@tests/deps.sh crun
	$(if $(filter-out 0,$(shell id -u)),sudo --preserve-env=PATH) env CARGO_TARGET_TMPDIR=$(target)/tmp tests/bench/http/run.py $(target)/release/neap

# cargo-deny takes minutes to compile, so it runs where it is installed; DENY=1 installs it.
# Without the advisory database (no network) licences, bans and sources are still checked.
.PHONY: test-deny
test-deny:
	@if [ -n "$(DENY)" ]; then $(CARGO) install --locked cargo-deny; fi
	@if ! $(CARGO) deny --version >/dev/null 2>&1; then \
	    echo "cargo-deny is not installed: advisories and licences unchecked (make test DENY=1 installs it)"; \
	elif $(CARGO) deny --config .deny.toml fetch db 2>/dev/null; then \
	    $(CARGO) deny --config .deny.toml check; \
	else \
	    echo "the advisory database can't be had: licences, bans and sources only"; \
	    $(CARGO) deny --config .deny.toml check licenses bans sources; \
	fi

# BENCH: arguments of the driver, such as `--rounds 50 --seconds 10`; NEAP: another binary to measure,
# such as the static one of `make cross`. The driver first: its build leaves a neap of its own profile
# where the release build puts the real one. About four minutes, five with PEERS=1, after the builds.
.PHONY: bench
bench: deps
	$(CARGO) bench --locked --no-run --bench bench
	$(if $(NEAP),,$(CARGO) build --locked --release --bin neap)
	PEERS=$(PEERS) tests/bench/run.sh $(target) $(if $(NEAP),--neap $(NEAP)) $(BENCH)

# Static binaries, and what is made of them. ARCH names some of cross/targets; default: all.
.PHONY: cross
cross: deps
	cross/build.sh $(ARCH)

.PHONY: cross-check
cross-check: cross
	@tests/deps.sh qemu-user-static qemu-user libfaketime
	cross/check.sh smoke $(ARCH)
	cross/check.sh year-2038 $(ARCH)
	cross/check.sh reproducible $(ARCH)

.PHONY: deb
deb: cross
	@tests/deps.sh debhelper lintian
	cross/deb.sh $(ARCH)

.PHONY: deb-check
deb-check:
	@tests/deps.sh mmdebstrap
	cross/deb-check.sh $(ARCH)

.PHONY: clean
clean:
	$(CARGO) clean
