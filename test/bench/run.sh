#!/bin/sh
# SPDX-License-Identifier: MPL-2.0
#
# Measures Weir on this machine and prints a table. Needs root, Go, and Debian's
# iptables and util-linux. Arguments go to the program, for example:
#
#   test/bench/run.sh -quick                 # under a minute: does everything work?
#   test/bench/run.sh -only connect,setup    # some measurements, all their rounds
#   test/bench/run.sh -json samples.json     # keep every sample
set -eu

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)

if ! command -v iptables-nft >/dev/null || ! command -v nsenter >/dev/null; then
	if [ -x "$root/test/tools/setup.sh" ]; then
		"$root/test/tools/setup.sh" test
	else
		apt-get install -y --no-install-recommends iptables util-linux
	fi
fi
[ -x "$root/bin/weir-cni" ] || make -s -C "$root" build

built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT
echo 'building the benchmark' >&2
(cd "$here" && CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o "$built/" . ./engine)

revision=$(git -C "$root" rev-parse --short HEAD 2>/dev/null || echo unknown)
"$built/bench" -engine "$built/engine" -plugin "$root/bin/weir-cni" -revision "$revision" "$@"
