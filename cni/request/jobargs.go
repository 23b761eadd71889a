// SPDX-License-Identifier: MPL-2.0

package request

// The arguments of network.cni.args that are Weir's, without their prefix.
const (
	Mode                 = "mode"
	Guard                = "guard"
	Egress               = "egress"
	Forward              = "forward"
	ProxyUID             = "proxy-uid"
	InboundPort          = "inbound-port"
	OutboundPort         = "outbound-port"
	DNS                  = "dns"
	ExcludeInboundPorts  = "exclude-inbound-ports"
	ExcludeOutboundPorts = "exclude-outbound-ports"
	ExcludeOutboundCIDRs = "exclude-outbound-cidrs"
	ExcludeUIDs          = "exclude-uids"
)

// JobArgs are all of them, in the order in which the plugin applies them.
func JobArgs() []string {
	return []string{
		Mode, Guard, Egress, Forward, ProxyUID, InboundPort, OutboundPort, DNS,
		ExcludeInboundPorts, ExcludeOutboundPorts, ExcludeOutboundCIDRs, ExcludeUIDs,
	}
}

// DefaultJobArgs are those that a job may set where the operator does not say:
// it can join the mesh and strengthen the guards, and take nothing out of the mesh.
func DefaultJobArgs() []string { return []string{Mode, Guard, Egress, InboundPort, OutboundPort} }
