#!/usr/bin/env bash
# SPDX-License-Identifier: MPL-2.0
#
# Fuzzes every native target of the tree, one after the other: FUZZTIME each, ten
# minutes if not said. All are run even when one finds something; Go leaves its input
# in testdata/fuzz of the package, where the normal suite keeps trying it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export CGO_ENABLED=0
time=${FUZZTIME:-10m} failed=0 count=0
while IFS=: read -r file target; do
	count=$((count + 1))
	printf 'fuzz: %s in ./%s, %s\n' "$target" "$(dirname "$file")" "$time"
	go test -trimpath "./$(dirname "$file")" -run '^$' -fuzz "^$target\$" -fuzztime "$time" -parallel 1 </dev/null || failed=1
done < <(git grep --untracked -oE '^func Fuzz[A-Za-z0-9]+' -- '*_test.go' | sed 's/:func /:/' | sort)
((count)) || { echo 'fuzz: found no target: is this a git clone?' >&2; exit 1; }
exit "$failed"
