// SPDX-License-Identifier: MPL-2.0

package cni

import (
	"context"
	"encoding/json"

	"github.com/weirmesh/weir/cni/network"
	"github.com/weirmesh/weir/cni/request"
	"github.com/weirmesh/weir/redirect/workload"
)

// Attached is an allocation whose network the plugin built.
type Attached struct {
	Key     workload.AttachmentID
	Job     workload.Job
	Network string          // its name
	NetNS   string          // path
	Cookie  uint64          // of the namespace; 0 where the record is of an earlier boot
	Ports   json.RawMessage // the host ports, as libcni handed them over; nil: none
	Maps    bool            // the host ports in its own way: network.HostPorts has those in force
}

// Networks lists the networks on record, those of ended namespaces too. What
// of them cannot be read comes back in the error, beside the rest.
func Networks(stateDir string) ([]Attached, error) {
	attachments, err := network.Attachments(stateDir)
	list := make([]Attached, 0, len(attachments))
	for _, a := range attachments {
		job, _ := request.ParseArgs(a.Args)
		list = append(list, Attached{Key: a.Key, Job: job, Network: a.Network, NetNS: a.NetNS, Cookie: a.Cookie, Ports: a.Ports, Maps: a.Maps})
	}
	return list, err
}

// RemoveNetworks removes from the node what no allocation that runs needs any
// more of the networks that the plugin built. removed says what, and kept names what
// looks like the plugin's and is not known to be of this state directory.
func RemoveNetworks(ctx context.Context, stateDir string) (removed, kept []string, err error) {
	return network.Uninstall(ctx, stateDir)
}

// RepairNetworks puts back what somebody flushed of the rules and host ports of
// the networks that the plugin built, and says what it put back.
func RepairNetworks(ctx context.Context, stateDir string) (repaired []string, err error) {
	return network.Repair(ctx, stateDir)
}
