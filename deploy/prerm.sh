#!/bin/sh
# SPDX-License-Identifier: MPL-2.0
# A node whose allocations need Weir keeps it: `weir uninstall` refuses and names
# them, and the package stays. dpkg calls it by an action, rpm by the number of versions
# that are left.
set -e

case $1 in remove | 0) ;; *) exit 0 ;; esac
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
