#!/bin/bash
# What building and testing neap needs beyond Rust, make and apt: installs the Debian packages
# and the rustup components that are missing, and nothing when none is.
#
#   tests/deps.sh [PACKAGE…]      PACKAGE: what one of make's targets needs besides
#
# As another user than root it asks sudo, for apt alone.
set -euo pipefail

packages=(
    build-essential     # SQLite and ring are compiled by a C compiler
    libseccomp-dev      # libseccomp.a
    ca-certificates     # cargo's downloads; neap's own roots for TLS
    mosquitto           # the broker of tests and demo
    mosquitto-clients
    openssl             # the tests' certificates
    busybox-static      # the example images, the VM's userland
    umoci               # builds the example images
    skopeo              # archives as other tools make them, pushes to the registry
    docker-registry     # what images are pulled from
    zstd
    mmdebstrap          # images with Debian's Python …
    python3-pip         # … and packages from PyPI, which the tests speak to
    qemu-system-x86     # make test-vm
    e2fsprogs           # the VM's disk
    libfaketime         # a clock that jumps
    python3-venv curl   # the toolchain of the static builds
    iproute2 nftables   # machines in network namespaces, and what is left on them,
    iptables            # and firewalls of others
    dnsmasq-base        # what answers for names at a site,
    redis-server redis-tools # and what functions with a way out speak to
    "$@"
)

missing=()
for package in "${packages[@]}"; do
    state=$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null) || true
    [ "$state" = "install ok installed" ] || missing+=("$package")
done

if [ ${#missing[@]} -gt 0 ]; then
    echo "deps: installing ${missing[*]}"
    root=()
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || {
            echo "deps: needs root for apt, and there is no sudo: apt-get install ${missing[*]}" >&2
            exit 1
        }
        root=(sudo)
    fi
    # Debian starts mosquitto when it is installed; the tests start their own on other ports.
    # A policy that is there already knows better.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then
        trap '"${root[@]}" rm -f $policy' EXIT
        printf '#!/bin/sh\nexit 101\n' | "${root[@]}" tee $policy >/dev/null
        "${root[@]}" chmod 755 $policy
    fi
    # `env`: sudo drops the environment.
    apt=("${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o Dpkg::Use-Pty=0)
    "${apt[@]}" update
    "${apt[@]}" install --no-install-recommends "${missing[@]}"
fi

# Other people's clients; tests find them in the target directory: the CloudEvents SDK, AWS's SDK.
python="${CARGO_TARGET_DIR:-$(dirname "$0")/../target}/python"
if [ ! -d "$python/cloudevents" ] || [ ! -d "$python/boto3" ]; then
    rm -rf "$python"
    /usr/bin/python3 -m pip install --quiet --target "$python" cloudevents==2.2.0 boto3==1.40.60
fi

for component in rustfmt clippy; do
    command=cargo-${component/rustfmt/fmt}
    if ! command -v "$command" >/dev/null || ! "$command" --version >/dev/null 2>&1; then
        command -v rustup >/dev/null || {
            echo "deps: \`cargo ${component/rustfmt/fmt}\` is missing, and there is no rustup to add it" >&2
            exit 1
        }
        rustup component add "$component"
    fi
done
