// SPDX-License-Identifier: MPL-2.0

// Package families tells which sockets of an allocation its egress guard does not see.
package families

import (
	"fmt"
	"slices"

	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
)

// Inspect tells what the egress guard does not see: sockets of other families
// where the program for them is not attached, and packet sockets that are older than it.
func Inspect(paths store.Paths, ns *host.Namespace, w workload.Workload, problem func(code health.ProblemCode, remedy, what string, args ...any)) error {
	if !program.FamiliesHeld(paths, w) {
		problem(health.ProblemFamiliesOpen, "run its CNI CHECK; where 'weir doctor' says that the kernel cannot, take CAP_NET_RAW from its tasks",
			"its egress guard does not see sockets of other families than IP: packet, vsock, XDP")
		return nil
	}
	if w.Egress != workload.GuardEnforce {
		return nil // where they are let out they are counted when they are made
	}
	open, err := olderPacketSockets(ns, w)
	if err != nil || len(open) == 0 {
		return err
	}
	problem(health.ProblemPacketSocketOpen, "restart the task that has it, or the allocation",
		"a packet socket is older than its egress guard, which does not see what it sends: %s", holdersOf(ns, open[0]))
	return nil
}

// olderPacketSockets are those that the guard would refuse if they were made now. One
// under the proxy's UID is a task's: Envoy has none.
func olderPacketSockets(ns *host.Namespace, w workload.Workload) ([]host.PacketSocket, error) {
	sockets, err := ns.PacketSockets()
	return slices.DeleteFunc(sockets, func(s host.PacketSocket) bool { return slices.Contains(w.ExcludeUIDs, s.UID) }), err
}

// holdersOf names a process that has the socket, or whose it was.
func holdersOf(ns *host.Namespace, s host.PacketSocket) string {
	holder := fmt.Sprintf("one under UID %d", s.UID)
	_ = ns.EachOwner(s.Inode, func(pid, _ int) (bool, error) { // it says no more where this fails
		holder = fmt.Sprintf("process %d (%s)", pid, host.CommandOf(pid))
		return true, nil
	})
	return holder
}
