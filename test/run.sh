#!/usr/bin/env bash
# SPDX-License-Identifier: MPL-2.0
#
# All tests: the units and the kernel tests, then the walks of test/e2e, which want the
# machine for themselves. Without root the tests that need it are skipped. Says a line
# for each package, and at the end what was not run and why, and what failed. With CI
# set a skip is a failure. PKG in the environment names packages to test instead of all,
# RUN tests as in go test.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

test/tools/setup.sh go
if ((EUID == 0)); then
	test/tools/setup.sh test envoy consul cni docker browser package lintian promtool firewalld ${CI:+race}
	mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf
fi
export PATH=$PWD/.tools/envoy:$PWD/.tools/bin:$PATH

log=$(mktemp)
trap 'rm -f "$log"' EXIT
notrun=()

# show passes everything on in CI, and else what is worth a person's time, at once.
show() {
	if [[ -n ${CI:-} ]]; then
		cat
	else
		grep --line-buffered -vE '^(=== (RUN|PAUSE|CONT|NAME) | *--- PASS: |PASS$)' || true
	fi
}

failed=0
# run WHAT ARGUMENT... tests packages: a line of each when it and those before it are done.
run() {
	local what=$1 start=$SECONDS
	shift
	printf 'test: %s\n' "$what"
	go test -count=1 -v "$@" 2>&1 | tee -a "$log" | show || failed=1
	printf 'test: %s: %d s\n' "$what" $((SECONDS - start))
}

if [[ -n ${PKG:-}${RUN:-} ]]; then
	read -ra some <<<"${PKG:-./...}"
	CGO_ENABLED=0 run "${some[*]}${RUN:+, tests $RUN}" -trimpath -timeout 30m ${RUN:+-run "$RUN"} "${some[@]}"
	test/summary.sh "$log" "all but ${some[*]}${RUN:+, tests $RUN}" || failed=1
	exit "$failed"
fi

mapfile -t racy < <(go list ./agent/... ./cni/...)
mapfile -t walks < <(go list ./test/e2e)
# Whole nodes have targets of their own: make e2e, make cluster, make soak, make programs.
mapfile -t nodes < <(go list ./test/e2e/nomad/... ./test/cluster ./test/soak ./test/programs)
mapfile -t others < <(go list ./... | grep -vxF -f <(printf '%s\n' "${racy[@]}" "${walks[@]}" "${nodes[@]}"))

# The race detector costs time and needs a C compiler: it runs where goroutines are.
cc=$(go env CC)
if command -v "${cc%% *}" >/dev/null; then
	race=(-race) cgo=1
else
	race=(-trimpath) cgo=0
	notrun+=("the race detector: there is no C compiler $cc: apt-get install gcc libc6-dev")
fi

export CGO_ENABLED=0 # as in make build, so that all packages are compiled once
# A slow machine takes longer than the ten minutes that go test gives a package.
run "${#others[@]} packages" -trimpath -timeout 30m "${others[@]}"
CGO_ENABLED=$cgo run "agent and plugin, ${#racy[@]} packages, ${race[0]}" "${race[@]}" -timeout 30m "${racy[@]}"
run "test/e2e, which has the machine for itself" -trimpath -timeout 30m "${walks[@]}"

notrun+=('job files on whole nodes: make e2e' 'a node under load while all around it fails, and upgrades: make soak' 'kernels in virtual machines: make test-vm')
test/summary.sh "$log" "${notrun[@]}" || failed=1
exit "$failed"
