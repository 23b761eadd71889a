#!/bin/sh
# SPDX-License-Identifier: MPL-2.0
#
# Measures Weir on this machine and prints a table. Needs root, Go, and Debian's
# iptables, nftables and util-linux. Arguments go to the program, for example:
#
#   test/bench/run.sh -quick                 # under a minute: does everything work?
#   test/bench/run.sh -only connect,setup    # some measurements, all their rounds
#   test/bench/run.sh -only agent            # the agent beside 1,000 proxies, eight minutes
#   test/bench/run.sh -only commands         # the commands on a node of 1,000 proxies
#   test/bench/run.sh -json samples.json     # keep every sample
#   test/bench/run.sh -readme docs/benchmarks.md # write the tables into it
#
# It runs in a mount namespace of its own, so that even after a crash no network
# namespace, no pin and no mount is left.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)

if ! command -v iptables-nft >/dev/null || ! command -v nsenter >/dev/null || ! command -v nft >/dev/null; then
	if [ -x "$root/test/tools/setup.sh" ]; then
		"$root/test/tools/setup.sh" test
	else
		apt-get install -y --no-install-recommends iptables nftables util-linux
	fi
fi
make -s -C "$root" build >&2 # of this revision: it is what the table names
consul=$root/.tools/bin/consul
[ -x "$consul" ] || consul=$(command -v consul || true)

built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT
echo 'building the benchmark' >&2
(cd "$here" && CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o "$built/" . ./engine)
# Consul's nftables engine wants a later Go than the rest.
(cd "$here/nftables" && GOTOOLCHAIN=go1.26.9 CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o "$built/nftables" .)

revision=$(git -C "$root" rev-parse --short HEAD 2>/dev/null || echo unknown)
unshare --mount "$built/bench" -engine "$built/engine" -nftables "$built/nftables" -plugin "$root/bin/weir-cni" -weir "$root/bin/weir" -consul "$consul" \
	-cni "$root/.tools/cni" -revision "$revision" "$@"
