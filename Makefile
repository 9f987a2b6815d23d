# Everything starts here, on a Debian 12 machine with Rust, make and apt; the rest is installed
# when it is missing (tests/deps.sh).
#
#   make demo       the whole way of an event, told as it goes; about a minute after the build
#   make test       all that is checked before a change goes in
#   make bench-buffer  neap's uplink beside a mosquitto bridge: lost, twice, drain rate, disk bytes
#   make soak       the crash matrix fifty times over, a million events; an hour or more
#   make build      the release binary, target/release/neap
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
	@$(MAKE) --no-print-directory test-format test-lint test-cargo test-vm test-deny
	@echo "make test: all passed"

.PHONY: test-format
test-format:
	$(CARGO) fmt --check

.PHONY: test-lint
test-lint:
	$(CARGO) clippy --locked --all-targets -- -D warnings

.PHONY: test-cargo
test-cargo:
	$(root_runner) $(CARGO) test --locked
	@cat $(target)/tmp/kill-test.txt 2>/dev/null || true

.PHONY: bench-buffer
bench-buffer: build
	CARGO_TARGET_TMPDIR=$(target)/tmp tests/bench/buffer.py $(target)/release/neap

# The matrix of faults and moments, and the simulation, at the size of a night.
.PHONY: soak
soak: deps
	NEAP_MATRIX_ROUNDS=50 NEAP_SIMULATED_DAYS=100000 \
	    $(root_runner) $(CARGO) test --locked --test integration -- crash:: simulation:: --nocapture
	@cat $(target)/tmp/crash-*.txt

# One run on cgroup v2: Debian's kernel under software emulation.
.PHONY: test-vm
test-vm:
	tests/vm/run.sh

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

.PHONY: clean
clean:
	$(CARGO) clean
