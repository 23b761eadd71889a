#!/usr/bin/env bash
# SPDX-License-Identifier: MPL-2.0
#
# Real job files on whole nodes: Nomad, Consul, Docker, Envoy and the reference CNI
# plugins, all real, in namespaces of their own. Wants root. With CI set a skip is a
# failure. Arguments go to "go test", such as -run 'TestNode/Exclusions'. WEIR_STORM
# is how many allocations TestStorm starts at once, 30 where it is not set. NOMAD,
# CONSUL and ENVOY are other versions of those than test/tools/setup.sh pins. PKG
# is another package than ./test/e2e/nomad, such as ./test/e2e.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

((EUID == 0)) || { echo 'a node needs root' >&2; exit 1; }
test/tools/setup.sh test envoy consul nomad cni docker
for name in nomad consul envoy; do
	version=${name^^}
	[[ -z ${!version:-} ]] || export "WEIR_TEST_${name^^}=$PWD/.tools/$name-${!version}/$name"
done

# One run at a time: nodes share the kernel, and where the pins of one are not seen its
# programs are found there, which may be those of another.
lock=/run/weir-e2e.lock
flock --nonblock "$lock" true || echo 'e2e: waits for the end of another run'

# Progress is told as it goes: a node that hangs shows where. What failed is told again
# at the end, since what a failed node logs is long.
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export CGO_ENABLED=0 # as in make build, so that all packages are compiled once
failed=0
flock --close "$lock" go test -trimpath -count=1 -v -timeout 30m "$@" "${PKG:-./test/e2e/nomad}" 2>&1 | tee "$log" || failed=1
test/summary.sh "$log" || failed=1
exit "$failed"
