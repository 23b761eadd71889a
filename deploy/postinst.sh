#!/bin/sh
# SPDX-License-Identifier: MPL-2.0
# Nothing is put into Nomad's way by the package alone. Where `weir install` was
# run before, its plugin follows the package's version. dpkg calls it by an action, rpm by
# the number of versions that are there afterwards.
set -e
systemd() { [ -d /run/systemd/system ]; }

case $1 in
configure | 1 | 2)
	! systemd || systemctl daemon-reload
	if [ -e /var/lib/weir/installed.json ]; then
		weir install
		! systemd || systemctl try-restart weir-agent.service
	else
		echo 'weir: next: weir install -dry-run, weir install, systemctl enable --now weir-agent'
	fi
	;;
esac
