#!/bin/sh
# SPDX-License-Identifier: MPL-2.0
# A node whose allocations need Weir keeps it: `weir uninstall` refuses and names
# them, and the package stays.
set -e

[ "$1" = remove ] || exit 0
active=
if [ -d /run/systemd/system ]; then
	! systemctl --quiet is-active weir-agent.service || active=yes
	systemctl stop weir-agent.service
fi
if ! weir uninstall; then
	[ -z "$active" ] || systemctl start weir-agent.service
	exit 1
fi
[ ! -d /run/systemd/system ] || systemctl disable weir-agent.service
