# SPDX-License-Identifier: MPL-2.0
# Completion of bash: weir itself says how a line goes on.
complete -C weir weir
