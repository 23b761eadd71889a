#!/usr/bin/env bash
# SPDX-License-Identifier: MPL-2.0
#
# Says how a run of tests ended: how many, what was not run and why, and at the very end
# what failed. Fails where something failed, and with CI set where something was skipped.
#
#	summary.sh LOG NOTRUN...
#
# LOG is what "go test -v" wrote, each NOTRUN is something that was not asked of it.
set -euo pipefail
log=$1
shift

count() { grep -cE "^ *--- $1: " "$log" || true; }

# skips counts the skipped tests by what they lack, as test.Need says it.
skips() {
	awk '
		/^ *[a-z0-9_]+\.go:[0-9]+: / { why = $0; sub(/^ *[a-z0-9_]+\.go:[0-9]+: /, "", why) }
		/^ *--- SKIP: / { lacking[why]++; last[why] = $3 }
		END {
			for (why in lacking)
				printf "  %s: %s\n", lacking[why] == 1 ? last[why] : lacking[why] " tests", why
		}
	' "$log" | sort
}

# failures names what failed, with its package: tests with the last that each said, and
# packages that did not build or did not come to an end.
failures() {
	awk '
		/^=== (RUN|NAME|CONT) / { current = $3 }
		/^ *[a-z0-9_]+\.go:[0-9]+: / {
			line = $0
			sub(/^ */, "      ", line)
			said[current, ++lines[current]] = substr(line, 1, 600)
		}
		/^ *--- FAIL: / {
			name = $3
			names[++n] = name
			for (i = lines[name] > 4 ? lines[name] - 3 : 1; i <= lines[name]; i++)
				names[n] = names[n] "\n" said[name, i]
		}
		/^panic: / { names[++n] = $0 }
		/^(FAIL|ok  )\t/ {
			package = $2
			sub(/^github.com\/weirmesh\/weir\//, "", package)
			for (i = 1; i <= n; i++)
				printf "  %s: %s\n", package, names[i]
			if (/^FAIL/ && (n == 0 || /\[/))
				printf "  %s: %s\n", package, /\[/ ? substr($0, index($0, "[")) : "it did not come to an end"
			n = 0
		}
		END { # of a package of which nothing more was heard
			for (i = 1; i <= n; i++)
				printf "  %s\n", names[i]
		}
	' "$log"
}

skipped=$(count SKIP)
printf '%d passed, %d failed, %d skipped\n' "$(count PASS)" "$(count FAIL)" "$skipped"
if ((skipped + $#)); then
	echo 'not run:'
	skips
	(($# == 0)) || printf '  %s\n' "$@"
fi
failed=$(failures)
if [[ -n ${CI:-} ]] && ((skipped)); then
	failed+=${failed:+$'\n'}"  $skipped tests were skipped, which is a failure in CI"
fi
if [[ -n $failed ]]; then
	printf 'failed:\n%s\n' "$failed"
	exit 1
fi
