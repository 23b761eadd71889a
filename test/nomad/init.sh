#!/usr/bin/env bash
# SPDX-License-Identifier: MPL-2.0
#
# Process 1 of a node: in namespaces of its own it puts a root together that is this
# machine's with a layer on top, and then waits. What it mounts here a reboot takes
# away; what lies in DIRECTORY stays.
#
#	init.sh DIRECTORY NAME TOOL...
#
# NAME is the host name. Each TOOL is a file of this machine that the node has in /opt/tools.
set -euo pipefail

directory=$1
name=$2
root=$directory/root
shift 2

mount --make-rprivate /
mkdir -p "$root" "$directory"/{upper,work,docker,log}
mount -t overlay -o "lowerdir=/,upperdir=$directory/upper,workdir=$directory/work" overlay "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t sysfs sysfs "$root/sys"
mount --rbind /sys/fs/cgroup "$root/sys/fs/cgroup"
mount -t bpf -o mode=0700 bpf "$root/sys/fs/bpf"
mount -t tmpfs -o mode=0755 tmpfs "$root/run"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
# The layer itself cannot carry Docker's layers.
mkdir -p "$root/var/lib/docker"
mount --bind "$directory/docker" "$root/var/lib/docker"
mkdir -p "$root/opt/tools"
for tool; do
	file=${tool##*/}
	# Its directory, and not the file: libcontainer runs Nomad by an overlay over that
	# directory, in which a file mounted alone would not be seen.
	mkdir -p "$root/opt/tools/of-$file"
	mount --bind "${tool%/*}" "$root/opt/tools/of-$file"
	ln -sf "of-$file/$file" "$root/opt/tools/$file"
done
mkdir "$root/run/machine"
cd "$root"
pivot_root . run/machine
umount --lazy /run/machine
rmdir /run/machine
hostname "$name"

echo ready
# Bash reaps whatever is orphaned; the one that started this holds the other end.
read -r _ || true
