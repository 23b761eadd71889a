#!/usr/bin/env bash
# SPDX-License-Identifier: MPL-2.0
#
# All tests: the units and the kernel tests, then the walks of test/e2e, which want the
# machine for themselves. Without root the tests that need it are skipped and say so.
# With CI set a skip is a failure.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ((EUID == 0)); then
	test/tools/setup.sh test envoy consul cni docker package
	mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf
fi
export PATH=$PWD/.tools/envoy:$PATH

log=$(mktemp)
trap 'rm -f "$log"' EXIT

# show passes everything on in CI, and else what is worth a person's time.
show() {
	if [[ -n ${CI:-} ]]; then
		cat
	else
		grep -vE '^(=== (RUN|PAUSE|CONT|NAME) | *--- PASS: |PASS$)' || true
	fi
}

failed=0
run() {
	go test -count=1 -v "$@" 2>&1 | tee -a "$log" | show || failed=1
}

count() { grep -cE "^ *--- $1: " "$log" || true; }

# The race detector costs time and needs a C compiler: it runs where goroutines are.
mapfile -t racy < <(go list ./agent/... ./cni/...)
mapfile -t walks < <(go list ./test/e2e)
# Whole nodes have a target of their own: make e2e.
mapfile -t nodes < <(go list ./test/e2e/nomad/...)
mapfile -t others < <(go list ./... | grep -vxF -f <(printf '%s\n' "${racy[@]}" "${walks[@]}" "${nodes[@]}"))

run "${others[@]}"
run -race "${racy[@]}"
run -timeout 30m "${walks[@]}"

skipped=$(count SKIP)
if [[ -n ${CI:-} ]] && ((skipped > 0)); then
	grep -B 2 -E '^ *--- SKIP: ' "$log"
	echo 'skipped in CI, where a skip is a failure'
	failed=1
fi
if ((failed)); then
	grep -E '^( *--- FAIL: |FAIL[[:space:]]|panic: )' "$log" || true
	exit 1
fi
printf '%d passed, %d failed, %d skipped\n' "$(count PASS)" "$(count FAIL)" "$skipped"
