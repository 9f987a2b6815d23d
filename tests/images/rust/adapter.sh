#!/bin/bash
# Compiles AWS's Lambda Web Adapter, an extension that puts a web server behind a Lambda function,
# as crates.io has it: one static binary, DIR/bin/lambda-adapter.
#
#   tests/images/rust/adapter.sh DIR
#
# What was compiled is kept in DIR, for the next build. Needs cargo and a C linker with a static C
# library.
set -euo pipefail
dir=$(realpath -m "$1")
mkdir -p "$dir"
target=$(rustc -vV | sed -n 's/^host: //p')
# With its own lock file: it stays what it is.
RUSTFLAGS="-C target-feature=+crt-static" CARGO_TARGET_DIR=$dir/build CARGO_PROFILE_DEV_DEBUG=false \
    cargo install --quiet --debug --locked --no-track --force --target "$target" --root "$dir" --version =0.9.1 \
    lambda_web_adapter >&2
