#!/bin/sh
# The compiler of the static builds: rustc, but for what build scripts ask of it to find out what it
# can do (anyhow, thiserror, num-traits, rustix). Their trials for the target succeed where rustup
# has the target's standard library installed and fail where it has not, and they are made before
# ours is compiled; so that the same source gives the same bytes on both, they fail everywhere.
# Nor are they to see the RUSTC_BOOTSTRAP that is meant for the standard library.
#
# Cargo sets NUM_JOBS, OPT_LEVEL, TARGET and HOST for build scripts alone.
if [ -n "${NUM_JOBS-}" ] && [ -n "${OPT_LEVEL-}" ]; then
    unset RUSTC_BOOTSTRAP
    if [ "${TARGET-}" != "${HOST-}" ]; then
        exec rustc --sysroot /nonexistent "$@"
    fi
fi
exec rustc "$@"
