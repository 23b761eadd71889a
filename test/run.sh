#!/usr/bin/env bash
# SPDX-License-Identifier: MPL-2.0
#
# All tests: the units and the kernel tests, then the walks of test/e2e, which want the
# machine for themselves. Without root the tests that need it are skipped and say so.
# With CI set nothing may be skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

flags=(-count=1)
if ((EUID == 0)); then
	test/tools/setup.sh test envoy
	mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf
fi
if [[ -n ${CI:-} ]]; then
	flags+=(-v)
fi
export PATH=$PWD/.tools/envoy:$PATH

log=$(mktemp)
trap 'rm -f "$log"' EXIT

mapfile -t racy < <(go list ./agent/... ./cni/...)
mapfile -t walks < <(go list ./test/e2e/...)
mapfile -t others < <(go list ./... | grep -vxF -f <(printf '%s\n' "${racy[@]}" "${walks[@]}"))

run() {
	go test "${flags[@]}" "$@" 2>&1 | tee -a "$log"
}

failed=0
run "${others[@]}" || failed=1
run -race "${racy[@]}" || failed=1
run -timeout 30m "${walks[@]}" || failed=1

if [[ -n ${CI:-} ]]; then
	passed=$(grep -cE '^ *--- PASS: ' "$log" || true)
	broken=$(grep -cE '^ *--- FAIL: ' "$log" || true)
	skipped=$(grep -cE '^ *--- SKIP: ' "$log" || true)
	if ((skipped > 0)); then
		grep -E '^ *--- SKIP: ' "$log"
		echo 'skipped in CI, where a skip is a failure'
		failed=1
	fi
	printf '%d passed, %d failed, %d skipped\n' "$passed" "$broken" "$skipped"
fi
exit $failed
