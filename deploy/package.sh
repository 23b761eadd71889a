#!/usr/bin/env bash
# SPDX-License-Identifier: MPL-2.0
#
# Makes the packages and the tarball of what `make build` built.
#
#	package.sh BIN OUT
#
# BIN has weir and weir-cni, for whatever architecture. OUT gets weir_VERSION_ARCH.deb,
# weir-VERSION-1.ARCH.rpm and weir-VERSION-linux-ARCH.tar.gz, what the programs are made
# of as weir-VERSION-linux-ARCH.spdx.json, and SHA256SUMS of all that lie there. The same input gives the same bytes: files have the time of
# SOURCE_DATE_EPOCH, by default that of the last commit. Programs that do not run on
# this machine cannot tell their version: VERSION does.
set -euo pipefail

die() {
	printf 'package: %s\n' "$*" >&2
	exit 1
}

bin=$(realpath "$1") out=$(realpath -m "$2")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -n ${NFPM:-} ]] || test/tools/setup.sh package # another nfpm is given

ROOT=$(mktemp -d)
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
trap 'rm -rf "$ROOT"' EXIT
umask 022
doc=$ROOT/usr/share/doc/weir
mkdir -p "$out" "$ROOT/made" "$ROOT/usr/lib/weir" "$doc" "$ROOT/tar/weir"

# What the programs were built for, by their own word.
GOARCH=$(go version -m "$bin"/{weir,weir-cni} | sed -n 's/^\tbuild\tGOARCH=//p' | sort -u)
[[ -n $GOARCH && $GOARCH != *$'\n'* ]] || die "read $bin: weir and weir-cni are built for: ${GOARCH:-nothing that they tell}"

# An installation lays out the tree, so it takes a weir that runs here.
host=$bin/weir
if [[ $GOARCH != "$(go env GOHOSTARCH)" ]]; then
	[[ -n ${VERSION:-} ]] || die "package $bin: programs for $GOARCH do not run here; name their version by VERSION"
	host=$ROOT/host/weir
	GOOS=linux GOARCH=$(go env GOHOSTARCH) CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=$VERSION" -o "$host" ./cmd/weir
fi
VERSION=$("$host" version | sed 's/^weir v\([^ ]*\).*/\1/')
grep -qaF "v$VERSION" "$bin/weir" || die "package $bin: its weir is not of version v$VERSION"
export VERSION GOARCH ROOT SOURCE_DATE_EPOCH

# copyright says what the programs are made of. The terms, each text once, go to a file
# beside it: Debian has those of Apache in a place of its own, and wants them nowhere else
# in a file of this name.
copyright() {
	cat <<-END
		Weir: eBPF redirection for Nomad allocations in a Consul service mesh
		Source: https://github.com/weirmesh/weir

		Copyright: 2026 The Weir authors
		License: MPL-2.0. Its text is in /usr/share/common-licenses/MPL-2.0 on Debian, and in
		LICENSE beside this file. The eBPF programs include headers of libbpf, which are
		BSD-2-Clause.

		The programs are linked with Go's standard library and with the modules below. Their
		terms are in LICENSES-OF-MODULES.gz beside this file. Of those under the Apache License,
		Version 2.0, the text is in /usr/share/common-licenses/Apache-2.0 on Debian, too.

	END
	local path version dir file key
	declare -A users texts
	while read -r path version dir; do
		for file in "$dir"/{LICEN[CS]E,COPYING,COPYRIGHT,NOTICE}*; do
			[[ -f $file && $file != *.docs ]] || continue
			key=$(sha256sum <"$file")
			users[$key]+="$path $version"$'\n'
			texts[$key]=$file
		done
	done < <(
		echo "Go $(go env GOVERSION GOROOT | paste -s -d ' ')"
		# What the binaries say of themselves.
		go version -m "$bin"/{weir,weir-cni} | awk '$1 == "dep" { print $2 }' | sort -u |
			xargs go list -m -f '{{ .Path }} {{ .Version }} {{ .Dir }}'
	)
	for key in "${!texts[@]}"; do
		printf '%s' "${users[$key]}"
	done | LC_ALL=C sort -u
	for key in "${!texts[@]}"; do
		printf '%s\t%s\n' "${users[$key]%%$'\n'*}" "$key"
	done | LC_ALL=C sort | while IFS=$'\t' read -r path key; do
		printf '\n----\n%s\n' "${users[$key]}"
		cat "${texts[$key]}"
	done >"$ROOT/licenses"
}

# changelog is what Debian wants of a package: which version it is, and since when.
changelog() {
	cat <<-END
		weir (${VERSION/-/\~}) unstable; urgency=medium

		  * Version $VERSION. What changed is in CHANGELOG.md beside this file.

		 -- The Weir authors <weir@weirmesh.example>  $(date --utc --rfc-email --date "@$SOURCE_DATE_EPOCH")
	END
}

# The unit and the configuration as an installation to these directories has them.
"$host" install -root "$ROOT" -manifest-dir /manifest -cni-path '' -cni-config-dir '' \
	-bin-dir /usr/bin -unit-dir /usr/lib/systemd/system -config-dir /etc/weir.d -plugin "$bin/weir-cni" >/dev/null
install -m 755 "$bin/weir" "$ROOT/usr/bin/"
install -m 755 "$bin/weir-cni" "$ROOT/usr/lib/weir/"
sbom=$ROOT/made/weir-$VERSION-linux-$GOARCH.spdx.json
GOOS=linux GOARCH=$(go env GOHOSTARCH) CGO_ENABLED=0 go run -trimpath ./test/sbom "$VERSION" "$bin"/{weir,weir-cni} >"$sbom"
install -m 644 README.md LICENSE CHANGELOG.md deploy/weir.nomad.hcl deploy/*.conflist "$sbom" "$doc/"
cp -r docs deploy/prometheus deploy/grafana "$doc/"
install -m 755 "$bin"/{weir,weir-cni} "$ROOT/tar/weir/"
install -m 644 README.md LICENSE CHANGELOG.md deploy/weir.nomad.hcl "$sbom" "$ROOT/tar/weir/"
cp -r docs deploy/prometheus deploy/grafana "$ROOT/tar/weir/"
# The manual, compressed as Debian wants it, and what completes commands in a shell. zsh of
# Debian looks in a directory of its own.
for page in dist/man/*; do
	section=${page##*.}
	mkdir -p "$ROOT/usr/share/man/man$section"
	gzip --no-name -9 <"$page" >"$ROOT/usr/share/man/man$section/${page##*/}.gz"
done
install -D -m 644 dist/completion/weir.bash "$ROOT/usr/share/bash-completion/completions/weir"
install -D -m 644 dist/completion/weir.fish "$ROOT/usr/share/fish/vendor_completions.d/weir.fish"
for functions in vendor-completions site-functions; do
	install -D -m 644 dist/completion/_weir "$ROOT/usr/share/zsh/$functions/_weir"
done
cp -r dist/man dist/completion "$ROOT/tar/weir/"
copyright >"$doc/copyright"
gzip --no-name -9 <"$ROOT/licenses" >"$doc/LICENSES-OF-MODULES.gz"
changelog | gzip --no-name -9 >"$doc/changelog.gz"
install -m 644 "$doc"/{copyright,LICENSES-OF-MODULES.gz} "$ROOT/tar/weir/"
find "$ROOT" -exec touch --no-dereference --date "@$SOURCE_DATE_EPOCH" {} +

# The name of a package is nfpm's to make: a version's "-" becomes "~".
for packager in deb rpm; do
	"${NFPM:-$PWD/.tools/bin/nfpm}" package --config deploy/nfpm.yaml --packager $packager --target "$ROOT/made" >"$ROOT/log" ||
		{ cat "$ROOT/log" >&2; die "make the $packager"; }
done
tar --create --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$SOURCE_DATE_EPOCH" -C "$ROOT/tar" weir |
	gzip --no-name -9 >"$ROOT/made/weir-$VERSION-linux-$GOARCH.tar.gz"
deb=$(basename "$ROOT"/made/*.deb) rpm=$(basename "$ROOT"/made/*.rpm)
for made in "$ROOT"/made/*; do
	printf 'made %s, %s\n' "$out/${made##*/}" "$(numfmt --to=iec "$(stat -c %s "$made")")"
	mv "$made" "$out/"
done
(cd "$out" && find . -maxdepth 1 -name 'weir[-_]*' -type f -printf '%P\0' | LC_ALL=C sort -z | xargs -0 sha256sum >SHA256SUMS)
echo "made $out/SHA256SUMS"
echo "next, on a node: dpkg -i $out/$deb or rpm -i $out/$rpm, then weir install -dry-run"
