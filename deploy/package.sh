#!/usr/bin/env bash
# SPDX-License-Identifier: MPL-2.0
#
# Makes the Debian package and the tarball of what `make build` built.
#
#	package.sh BIN OUT
#
# BIN has weir and weir-cni, OUT gets weir_VERSION_ARCH.deb and
# weir-VERSION-linux-ARCH.tar.gz. The same input gives the same bytes: files have the
# time of SOURCE_DATE_EPOCH, by default that of the last commit.
set -euo pipefail
bin=$(realpath "$1") out=$(realpath -m "$2")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
test/tools/setup.sh package

VERSION=$("$bin/weir" version | sed 's/^weir v\([^ ]*\).*/\1/')
GOARCH=$(go env GOARCH)
ROOT=$(mktemp -d)
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export VERSION GOARCH ROOT SOURCE_DATE_EPOCH
trap 'rm -rf "$ROOT"' EXIT
umask 022
mkdir -p "$out" "$ROOT"/usr/{lib/weir,share/doc/weir} "$ROOT/tar/weir"

# The unit and the configuration as an installation to these directories has them.
"$bin/weir" install -root "$ROOT" -manifest-dir /manifest -cni-path '' -cni-config-dir '' \
	-bin-dir /usr/bin -unit-dir /usr/lib/systemd/system -config-dir /etc/weir.d -plugin "$bin/weir-cni" >/dev/null
install -m 755 "$bin/weir-cni" "$ROOT/usr/lib/weir/"
install -m 644 README.md LICENSE deploy/weir.nomad.hcl deploy/*.conflist "$ROOT/usr/share/doc/weir/"
cp -r docs "$ROOT/usr/share/doc/weir/"
install -m 755 "$bin"/{weir,weir-cni} "$ROOT/tar/weir/"
install -m 644 README.md LICENSE deploy/weir.nomad.hcl "$ROOT/tar/weir/"
cp -r docs "$ROOT/tar/weir/"
find "$ROOT" -exec touch --no-dereference --date "@$SOURCE_DATE_EPOCH" {} +

"${NFPM:-$PWD/.tools/bin/nfpm}" package --config deploy/nfpm.yaml --packager deb --target "$out" >"$ROOT/log" || { cat "$ROOT/log" >&2; exit 1; }
tar --create --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$SOURCE_DATE_EPOCH" -C "$ROOT/tar" weir |
	gzip --no-name -9 >"$out/weir-$VERSION-linux-$GOARCH.tar.gz"
ls -1 "$out"/weir[_-]"$VERSION"[_-]*
