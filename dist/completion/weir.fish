# SPDX-License-Identifier: MPL-2.0
# Completion of fish: weir itself says how a line goes on.
function __complete_weir
    COMP_LINE=(commandline -cp) weir 2>/dev/null
end
complete -f -c weir -a '(__complete_weir)'
