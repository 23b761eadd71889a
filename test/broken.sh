#!/usr/bin/env bash
# SPDX-License-Identifier: MPL-2.0
#
# Breaks a copy of this tree by the patches of test/broken, one by one, and wants the
# tests to fail that each names in lines "caught by: COMMAND". The same tests have to pass
# without the patch. Arguments are names of patches; without any all are tried.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z --cached --others --exclude-standard | tar --null --files-from - --create | tar --extract --directory "$copy"
ln -sfn "$PWD/.tools" "$copy/.tools"
export CGO_ENABLED=0
GIT_DIR=$(git rev-parse --absolute-git-dir) # soak builds the last release out of the history
export GIT_DIR

# run COMMAND runs a command in the copy and leaves what it says in its file "log".
run() { (cd "$copy" && eval "$1") >"$copy/log" 2>&1; }

failed=0 count=0
[[ $# -gt 0 ]] || set -- test/broken/*.patch
for patch; do
	name=$(basename "$patch" .patch) patch=test/broken/$(basename "$patch" .patch).patch
	sed "/^caught by: /,\$d; s/^/broken: $name: /" "$patch"
	while IFS= read -r command; do
		count=$((count + 1)) start=$SECONDS
		if ! run "$command -count=1"; then
			printf 'broken: %s: "%s" fails without the patch:\n' "$name" "$command"
			tail -30 "$copy/log"
			failed=1
			continue
		fi
		patch --directory "$copy" --strip 1 --quiet <"$patch"
		if run "$command -count=1"; then
			printf 'broken: %s: "%s" passes with the patch\n' "$name" "$command"
			failed=1
		else
			# A copy that cannot be built is caught by nobody.
			told=$(grep -E '^ +[a-z_0-9]+_test\.go:[0-9]+: ' -A2 "$copy/log" | grep -vE 'the same again: make soak|_test\.go:[0-9]+: ([0-9a-z]+, seed [0-9]+$|[0-9]+ connections, )' | head -3 || true)
			[[ -n $told ]] || { tail -30 "$copy/log" && failed=1; }
			printf 'broken: %s: caught by "%s", both runs took %d s:\n%.400s\n' "$name" "$command" $((SECONDS - start)) "$told"
		fi
		patch --directory "$copy" --strip 1 --quiet --reverse <"$patch"
	done < <(sed -n 's/^caught by: //p' "$patch")
done
((count)) || { echo 'broken: no patch names a test' >&2; exit 1; }
exit "$failed"
