#!/bin/sh
# SPDX-License-Identifier: MPL-2.0
#
# Measures what nodes cost Consul, beside the revision BEFORE where one is named, whose
# agent's Consul part is built from its own sources. Arguments go to the program:
#
#   test/consulcost/run.sh                                # this revision alone
#   BEFORE=HEAD~20 test/consulcost/run.sh -seconds 60
set -eu

root=$(cd "$(dirname "$0")/../.." && pwd)
consul=$root/.tools/bin/consul
[ -x "$consul" ] || consul=$(command -v consul)

built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT
cd "$root"
go build -o "$built/now" ./test/consulcost
if [ -n "${BEFORE:-}" ]; then
	mkdir "$built/tree"
	git archive "$BEFORE" | tar -x -C "$built/tree"
	mkdir -p "$built/tree/test/consulcost"
	cp test/consulcost/*.go "$built/tree/test/consulcost/"
	# The revision need not name what only this program imports.
	(cd "$built/tree" && go build -mod=mod -o "$built/before" ./test/consulcost)
	set -- -before "$built/before" "$@"
fi
"$built/now" -consul "$consul" "$@"
