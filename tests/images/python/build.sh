#!/bin/bash
# Builds an image with Debian's python3 and packages from PyPI, for tests that run other people's
# servers: an OCI archive, `NAME:1`, without entrypoint or command.
#
#   tests/images/python/build.sh OUT.tar NAME PACKAGE… [-- DIR]
#
# DIR is copied over the root. What was downloaded is kept beside OUT.tar, for the next build.
# Needs mmdebstrap, umoci, GNU tar and Debian's python3-pip; no registry.
set -euo pipefail

out=$(realpath -m "$1") name=$2
shift 2
packages=() dir=
while [ $# -gt 0 ]; do
    case $1 in
        --) dir=$2; shift ;;
        *) packages+=("$1") ;;
    esac
    shift
done

cache=$(dirname "$out")/cache
mkdir -p "$cache"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
umask 022

# Two builds at once would both download.
exec 9>"$cache/lock"
flock 9
# libstdc++6: of extensions in C++. ca-certificates and locales would only be weight.
suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
if [ ! -f "$cache/python-$suite.tar" ]; then
    # extract: the packages' files, none of their scripts, which would want a kernel's favours.
    mmdebstrap --quiet --variant=extract --include=python3,libstdc++6,libpython3-stdlib \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' \
        "$suite" "$cache/part-$suite.tar" >&2
    mv "$cache/part-$suite.tar" "$cache/python-$suite.tar"
fi
mkdir "$work/root"
tar -C "$work/root" -xf "$cache/python-$suite.tar" --exclude=./dev
mkdir -p "$work/root/dev"
if [ ${#packages[@]} -gt 0 ]; then
    /usr/bin/python3 -m pip install --quiet --disable-pip-version-check --no-input --no-compile \
        --root-user-action=ignore --only-binary :all: --cache-dir "$cache/pip" \
        --target "$work/root/usr/local/lib/python-packages" "${packages[@]}" >&2
fi
flock -u 9
if [ -n "$dir" ]; then cp -a "$dir/." "$work/root/"; fi

tar --format=gnu --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 -C "$work/root" -cf "$work/layer.tar" .
layout=$work/layout
umoci init --layout "$layout"
umoci new --image "$layout:1"
umoci raw add-layer --image "$layout:1" "$work/layer.tar"
umoci config --image "$layout:1" --no-history \
    --config.env PATH=/usr/local/bin:/usr/bin:/bin --config.env PYTHONPATH=/usr/local/lib/python-packages:/app \
    --config.env PYTHONUNBUFFERED=1 --config.env PYTHONDONTWRITEBYTECODE=1 --config.workingdir /
umoci gc --layout "$layout" 2>/dev/null
sed -i "s|\"org.opencontainers.image.ref.name\":\"1\"|\"org.opencontainers.image.ref.name\":\"$name:1\"|" "$layout/index.json"
tar -C "$layout" -cf "$work/out.tar" oci-layout index.json blobs
mv "$work/out.tar" "$out"
