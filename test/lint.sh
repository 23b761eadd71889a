#!/usr/bin/env bash
# SPDX-License-Identifier: MPL-2.0
#
# Every check that needs no kernel. Runs all of them, then fails if one did.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly GO_LINES=400 C_LINES=500 PACKAGE_LINES=1500
# Packages that are larger than that, with what they may have at most: tools of the tests, of
# which each is one program or one fixture, and none of the product. None grows unseen.
declare -rA LARGER=([test/bench]=4000 [test/nomad]=2700 [test/vm]=2000)
failed=0

# check NAME COMMAND... runs a check and goes on.
check() {
	local name=$1
	shift
	if "$@"; then
		printf 'lint: %s ok\n' "$name"
	else
		printf 'lint: %s FAILED\n' "$name"
		failed=1
	fi
}

# files PATTERN... lists what is in the tree or about to be, without what is generated.
files() {
	git ls-files --cached --others --exclude-standard -- "$@" |
		while read -r file; do
			[[ -f $file ]] && ! grep -q '^// Code generated .* DO NOT EDIT\.$' "$file" && printf '%s\n' "$file"
		done
}

# budget LINES PATTERN... names the files that are longer.
budget() {
	local limit=$1 over=0 lines file
	shift
	while read -r file; do
		lines=$(wc -l <"$file")
		if ((lines > limit)); then
			printf '%s: %d lines, more than %d\n' "$file" "$lines" "$limit"
			over=1
		fi
	done < <(files "$@")
	return $over
}

# rooms names the packages that have more lines of product code than they may, without
# comments and empty lines.
rooms() {
	local over=0 dir lines limit
	while read -r dir; do
		lines=$(files "$dir/*.go" | grep -E "^$dir/[^/]+$" | grep -v '_test\.go$' | xargs --no-run-if-empty cat | grep -vcE '^[[:space:]]*(//.*)?$')
		limit=${LARGER[$dir]:-$PACKAGE_LINES}
		if ((lines > limit)); then
			printf '%s: %d lines of product code, at most %d\n' "$dir" "$lines" "$limit"
			over=1
		fi
	done < <(git ls-files '*.go' | xargs -n1 dirname | sort -u)
	return $over
}

licensed() {
	local missing
	missing=$(files '*.go' '*.c' '*.h' '*.sh' | xargs grep -L 'SPDX-License-Identifier: MPL-2.0')
	[[ -z $missing ]] || { printf 'no licence line: %s\n' $missing; return 1; }
}

format_c() {
	files '*.c' '*.h' | xargs --no-run-if-empty clang-format --dry-run -Werror
}

links() {
	files '*.md' | xargs go run ./test/docs
}

# The README stays short enough to be read.
readme() {
	local lines widest
	lines=$(wc -l <README.md)
	widest=$(wc -L <README.md)
	((lines <= 150 && widest <= 100)) || { echo "README.md: $lines lines, at most 150; $widest columns, at most 100"; return 1; }
}

# Words of the first versions that nobody searches for. What stands in files on disk (json:) stays.
words() {
	local found
	found=$(git grep -nwiE 'sighting|distrust|blur|condemned|desire|enlist|follower|hooked|hurry|inhabited|pressed|rename_peer|requester|strays|unwritten|hasten|heed|outlived|disown|is_rival|claimants?|in step|out of step|taken in|mend(s|ed|ing)?|swept|sweeps?' \
		-- '*.go' '*.c' '*.h' '*.md' '*.hcl' Makefile ':!CHANGELOG.md' ':!docs/adr' || true)
	[[ -z $found ]] || { printf '%s\n' "$found" && return 1; }
}

# The faults that "make broken" puts into a copy of the tree still fit it: that target runs
# rarely, and a patch that does not apply proves nothing.
faults() {
	local patch stale=0
	for patch in test/broken/*.patch; do
		git apply --check "$patch" || stale=1
	done
	return $stale
}

check 'links' links
check 'words' words
check 'size of the README' readme
check 'lines of Go' budget "$GO_LINES" '*.go'
check 'lines of a package' rooms
check 'lines of C' budget "$C_LINES" '*.c' '*.h'
check 'licence lines' licensed
check 'format of C' format_c
check 'faults of make broken' faults
check 'go vet' go vet ./...
check 'golangci-lint' .tools/bin/golangci-lint run
exit $failed
