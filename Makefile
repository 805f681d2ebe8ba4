# Two commands for newcomers: `make demo` and `make test`. Both do all their set-up.

SHELL := /bin/bash
CARGO ?= cargo
# Where built things go, besides Cargo's own target directory.
OUT ?= out
TARGET := $(or $(CARGO_TARGET_DIR),target)
BIN := $(TARGET)/release

.PHONY: all build demo test lint boot-test test-heavy install packages rust clean

all: build

## Installs the Debian packages of packages.txt that are missing.
packages:
	@tools/packages

rust:
	@command -v $(CARGO) >/dev/null || { echo "Rust is missing: install it with rustup (at least version $$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml))." >&2; exit 1; }

## Builds every program, optimised.
build: packages rust
	$(CARGO) build --release --locked --workspace --bins
	@ln -sf VBoxManage $(BIN)/vboxmanage

## Boots Debian's kernel in a virtual machine and connects this terminal to its serial console.
demo: build
	@PATH="$(abspath $(BIN)):$$PATH" OUT="$(abspath $(OUT))" demo/run

## Everything a change has to pass.
test: packages rust lint
	tools/test $(OUT)

lint: rust
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	tools/check-layers

## Boots guests: slow, in part; `make test` runs a sample.
boot-test: build
	OUT="$(abspath $(OUT))" tools/boot-test

## The long-running suites.
test-heavy: build
	OUT="$(abspath $(OUT))" tools/test-heavy

## Installs the programs: make install PREFIX=/usr/local
PREFIX ?= /usr/local
install: build
	install -d $(DESTDIR)$(PREFIX)/bin
	install $(addprefix $(BIN)/,VBoxManage VBoxSVC VBoxHeadless VBoxIntNetSwitch VBoxNetAdpCtl) $(DESTDIR)$(PREFIX)/bin
	ln -sf VBoxManage $(DESTDIR)$(PREFIX)/bin/vboxmanage

clean:
	rm -rf $(OUT)
	$(CARGO) clean
