#!/bin/bash
# Debian packages in target/dist/neap_VERSION-1_DEB.deb, from the binaries that cross/build.sh left
# there. By debhelper: systemd's and sysvinit's parts, conffiles, debconf and checksums are then
# Debian's own, and no gateway gets maintainer scripts that only neap has.
#
#   cross/deb.sh [ARCH…]        without one: all of cross/targets
set -euo pipefail
. cross/lib.sh

arches=("$@")
[ $# -gt 0 ] || mapfile -t arches < <(all_arches)

for tool in dh dpkg-buildpackage lintian; do
    command -v $tool >/dev/null || fail "\`$tool\` is not installed; \`make deb\` brings it"
done

# What is linked in, by the lock: name, version, licence.
crates() {
    cargo tree --locked --edges normal --target "$1" --prefix none --format '{p} {l}' |
        sed -n 's/ (\*)$//; s/ (proc-macro)//; s/^\([^ ]*\) v\([^ ]*\) /\1 \2 /p' | sort -u
}

manual=$work/manual
rm -rf "$manual"
cargo run --quiet --locked --example manual -- "$manual"

# The time in the package is that of the last change, so that it too comes out the same twice.
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct 2>/dev/null || date -r Cargo.lock +%s)
export SOURCE_DATE_EPOCH

for arch in "${arches[@]}"; do
    read_target "$arch"
    binary=$(binary "$arch")
    [ -x "$binary" ] || fail "no $binary: \`make cross ARCH=$arch\` makes it"
    stage=$work/deb/$arch/neap-$version
    rm -rf "$work/deb/$arch"
    mkdir -p "$stage"

    cp -r cross/debian "$stage/debian"
    chmod 644 "$stage"/debian/*
    chmod 755 "$stage/debian/rules"
    sed 's|/usr/local/bin/neap|/usr/bin/neap|; /^# neap as a systemd service/,/^$/d' \
        configs/neap.service >"$stage/debian/neap.service"
    cp configs/neap.init "$stage/debian/neap.init"
    cat >"$stage/debian/changelog" <<CHANGELOG
neap ($version-1) stable; urgency=medium

  * See changelog.gz beside this file.

 -- $(sed -n 's/^Maintainer: //p' cross/debian/control)  $(date -u -R -d "@$SOURCE_DATE_EPOCH")
CHANGELOG

    files=$stage/files
    share=$files/usr/share
    install -D -m 755 "$binary" "$files/usr/bin/neap"
    install -D -m 644 configs/minimal.toml "$files/etc/neap/neap.toml"
    install -D -m 644 "$manual/bash/neap.bash" "$share/bash-completion/completions/neap"
    install -D -m 644 "$manual/zsh/_neap" "$share/zsh/vendor-completions/_neap"
    install -D -m 644 "$manual/fish/neap.fish" "$share/fish/vendor_completions.d/neap.fish"
    install -D -m 644 README.md "$share/doc/neap/README.md"
    install -D -m 644 CHANGELOG.md "$share/doc/neap/CHANGELOG.md"
    crates "$rust" >"$share/doc/neap/crates"
    cp -r "$manual/man" "$stage/man"
    mkdir "$stage/examples"
    cp -r configs/neap.toml configs/functions.d "$stage/examples/"

    # -d: what is needed is checked above. Nothing is compiled, so no cross compiler either.
    (cd "$stage" && dpkg-buildpackage -b -d -uc -us -a"$deb" >"../build.log" 2>&1) || {
        tail -n 30 "$work/deb/$arch/build.log" >&2
        fail "dpkg-buildpackage failed for $arch"
    }
    package=neap_${version}-1_$deb.deb
    lintian --no-cfg --fail-on error --tag-display-limit 0 "$work/deb/$arch/$package" ||
        fail "lintian objects to $package"
    cp "$work/deb/$arch/$package" "$dist/$package.part"
    mv "$dist/$package.part" "$dist/$package"
    echo "cross: $dist/$package: $(stat -c %s "$dist/$package") bytes"
done
