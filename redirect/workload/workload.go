// SPDX-License-Identifier: MPL-2.0

// Package workload is the pure model of what is asked for one network namespace:
// the request at ADD, what Consul says of its mesh, both merged and validated, and
// the ranges of addresses that carry an origin. It asks neither kernel nor disk.
package workload

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Defaults that Consul's own redirection engine uses where a request is silent.
const (
	DefaultOutboundPort = 15001     // the proxy's outbound listener
	DefaultDNSPort      = 53        // the port that applications dial for DNS
	DefaultBudget       = 65536     // origin addresses that one workload may hold at a time
	MaxBudget           = 1<<23 - 2 // indexes in the encoded range
)

// AttachmentID names one attachment of an allocation to a network, as CNI does. It is
// the only thing that a DEL can be sure to carry.
type AttachmentID struct {
	ContainerID string `json:"container_id"` // Nomad: the full allocation ID
	IfName      string `json:"if_name"`
}

// String is the form used in file names: "<container-id>-<ifname>".
func (k AttachmentID) String() string { return k.ContainerID + "-" + k.IfName }

// Mode says what is done with a workload's traffic.
type Mode string

// The modes of a workload.
const (
	ModeTransparent Mode = "transparent" // every TCP connection goes through the proxy
	ModeDirect      Mode = "direct"      // explicit upstreams only; nothing is redirected
	ModeGateway     Mode = "gateway"     // the proxy is a gateway; nothing is redirected
)

// Guard says what may be reached from outside a workload's namespace beside the
// proxy's listener and the inbound exclusions.
type Guard string

// The strengths of the guard. A transparent workload needs none for TCP: what
// is not excluded goes to the proxy.
const (
	GuardOff     Guard = "off"     // everything, uncounted
	GuardAudit   Guard = "audit"   // everything, but counted and reported
	GuardEnforce Guard = "enforce" // nothing
)

// guards are all, the weakest first.
func guards() []Guard { return []Guard{GuardOff, GuardAudit, GuardEnforce} }

// Known reports whether there is such a guard.
func (g Guard) Known() bool { return slices.Contains(guards(), g) }

// MaxGuard is the stronger of two guards: a job never weakens the operator's.
// "" is GuardOff. A guard that there is not comes out, for Validate to refuse.
func MaxGuard(a, b Guard) Guard {
	order := guards()
	for _, guard := range []Guard{a, b} {
		if guard != "" && !guard.Known() {
			return guard
		}
	}
	return order[max(0, slices.Index(order, a), slices.Index(order, b))]
}

// MaxEgress is MaxGuard for the egress guard, of which "" is the weakest: a record
// of a version without it is equal to one where it is off.
func MaxEgress(a, b Guard) Guard {
	if guard := MaxGuard(a, b); guard != GuardOff {
		return guard
	}
	return ""
}

// Job names the Nomad job that a workload belongs to, for people.
type Job struct {
	Region    string `json:"region,omitempty"`
	Namespace string `json:"namespace,omitempty"`
	ID        string `json:"id,omitempty"`
	Group     string `json:"group,omitempty"`
	AllocID   string `json:"alloc_id,omitempty"`
}

// NomadNames are the names by which Nomad knows an allocation, under the keys that
// everything has in JSON and in logs. Metrics have nomad_job, as Prometheus has a
// "job" of its own.
type NomadNames struct {
	AllocID   string `json:"alloc_id"`
	Namespace string `json:"namespace"`
	TaskGroup string `json:"task_group"`
}

// Names are those of the job's allocation, which the key names where the request
// named none.
func (j Job) Names(key AttachmentID) NomadNames {
	return NomadNames{AllocID: cmp.Or(j.AllocID, key.ContainerID), Namespace: j.Namespace, TaskGroup: j.Group}
}

// SetArg takes in one of the arguments by which Nomad names the job to plugins,
// and reports whether it is one.
func (j *Job) SetArg(name, value string) bool {
	switch name {
	case "NOMAD_REGION":
		j.Region = value
	case "NOMAD_NAMESPACE":
		j.Namespace = value
	case "NOMAD_JOB_ID":
		j.ID = value
	case "NOMAD_GROUP_NAME":
		j.Group = value
	case "NOMAD_ALLOC_ID":
		j.AllocID = value
	default:
		return false
	}
	return true
}

// DNS is Consul's resolver as the workload should reach it. The zero value
// turns DNS steering off. With Address and Port, datagrams and connections to
// Address:53 go to Address:Port. With Port alone, Address is 127.0.0.1. With
// Address alone, port 53 of every server goes to Address:53. This is what
// Consul's own iptables engine does with the same two fields.
type DNS struct {
	Address netip.Addr `json:"address,omitzero"`
	Port    uint16     `json:"port,omitempty"`
}

// Request is what the plugin was asked for at ADD. The plugin writes it and
// nobody else; what Consul adds later is the MeshConfig.
type Request struct {
	Network      string `json:"network"` // name of the CNI network
	Job          Job    `json:"job,omitzero"`
	Mode         Mode   `json:"mode"`
	ProxyUID     uint32 `json:"proxy_uid"`
	InboundPort  uint16 `json:"inbound_port"` // 0: not known yet; inbound is refused by name until it is
	OutboundPort uint16 `json:"outbound_port"`
	DNS          DNS    `json:"dns,omitzero"`
	Guard        Guard  `json:"guard,omitempty"`   // the least that the mesh configuration's may be
	Egress       Guard  `json:"egress,omitempty"`  // likewise, of the egress guard
	Forward      bool   `json:"forward,omitempty"` // let packets be forwarded through the namespace

	ExcludeInboundPorts  []uint16       `json:"exclude_inbound_ports,omitempty"`
	ExcludeOutboundPorts []uint16       `json:"exclude_outbound_ports,omitempty"`
	ExcludeOutboundCIDRs []netip.Prefix `json:"exclude_outbound_cidrs,omitempty"`
	ExcludeUIDs          []uint32       `json:"exclude_uids,omitempty"`

	// Addresses are the workload's own, as CNI's previous result names them.
	// Traffic to them stays local; the first of each family is the source
	// that the proxy and the application see.
	Addresses []netip.Addr `json:"addresses,omitempty"`

	// Budget is how many origin addresses the workload may hold; 0 means
	// DefaultBudget.
	Budget uint32 `json:"budget,omitempty"`

	// Notes are remarks on the request that an operator should see, for
	// example a port that the request named as "0".
	Notes []string `json:"notes,omitempty"`
}

// Upstream is an explicit Consul upstream: a local listener of the proxy that
// is also reachable by the upstream's virtual IPs.
type Upstream struct {
	Name      string         `json:"name"`
	Addresses []netip.Addr   `json:"addresses"` // virtual IPs
	Listener  netip.AddrPort `json:"listener"`
}

// MeshConfig is what Consul knows of a workload beyond its Request. The agent
// writes it and nobody else. Zero fields leave the request as it is.
type MeshConfig struct {
	InboundPort         uint16     `json:"inbound_port,omitempty"`
	OutboundPort        uint16     `json:"outbound_port,omitempty"`
	ExcludeInboundPorts []uint16   `json:"exclude_inbound_ports,omitempty"` // added to the request's
	Upstreams           []Upstream `json:"upstreams,omitempty"`
	Guard               Guard      `json:"guard,omitempty"`   // "" is GuardOff
	Egress              Guard      `json:"egress,omitempty"`  // likewise
	Forward             bool       `json:"forward,omitempty"` // or the request's

	// ExposedPorts are those of the first proxy's listeners for what is not the
	// mesh's: expose paths, metrics, a gateway's own. One is open while the
	// proxy itself listens there, and leads to nobody else.
	ExposedPorts []uint16 `json:"exposed_ports,omitempty"`

	// Service is that of the first proxy, which the ports above are of and
	// which has all that no other owns. Proxies are the others, in order: of
	// two that claim the same, the former has it.
	Service string    `json:"service,omitempty"`
	Proxies []Sidecar `json:"proxies,omitempty"`
}

// Workload is the desired state of one network namespace: Request and MeshConfig
// merged. It is what the rest of the package turns into map rows.
type Workload struct {
	Mode                 Mode
	ProxyUID             uint32
	InboundPort          uint16
	OutboundPort         uint16
	DNS                  DNS
	ExcludeInboundPorts  []uint16
	ExcludeOutboundPorts []uint16
	ExcludeOutboundCIDRs []netip.Prefix
	ExcludeUIDs          []uint32
	Addresses            []netip.Addr
	Upstreams            []Upstream
	ExposedPorts         []uint16 // of the first proxy
	Guard                Guard
	Egress               Guard // what leaves the namespace past the proxy
	Forward              bool  // it may forward packets
	Budget               uint32
	Ephemeral            PortRange
	Sources              Sources
	Broadcasts           []netip.Addr // of its networks
	Sliced               bool         // its indexes may be of all slices
	Service              string
	Proxies              []Sidecar
	Seats                []uint8 // of all proxies, the first one's first; nil: in their order
}

// PortRange is a namespace's ip_local_port_range, both ends included.
type PortRange struct{ First, Last uint16 }

// Merge is the pure function from a request and what Consul adds to the
// desired workload. Lists come out sorted and without duplicates, so that two
// equal wishes give two equal workloads; only the workload's own addresses keep
// their order, which has a meaning.
func Merge(request Request, meshConfig MeshConfig) Workload {
	w := Workload{
		Mode:                 request.Mode,
		ProxyUID:             request.ProxyUID,
		InboundPort:          request.InboundPort,
		OutboundPort:         request.OutboundPort,
		DNS:                  request.DNS,
		ExcludeInboundPorts:  sorted(slices.Concat(request.ExcludeInboundPorts, meshConfig.ExcludeInboundPorts)),
		ExposedPorts:         sorted(slices.Clone(meshConfig.ExposedPorts)),
		ExcludeOutboundPorts: sorted(slices.Clone(request.ExcludeOutboundPorts)),
		ExcludeUIDs:          sorted(slices.Clone(request.ExcludeUIDs)),
		Addresses:            slices.Clone(request.Addresses),
		Guard:                MaxGuard(request.Guard, meshConfig.Guard),
		Egress:               MaxEgress(request.Egress, meshConfig.Egress),
		Forward:              request.Forward || meshConfig.Forward,
		Budget:               request.Budget,
		Service:              meshConfig.Service,
	}
	for _, proxy := range meshConfig.Proxies {
		w.Proxies = append(w.Proxies, proxy.clone())
	}
	for _, cidr := range request.ExcludeOutboundCIDRs {
		w.ExcludeOutboundCIDRs = append(w.ExcludeOutboundCIDRs, cidr.Masked())
	}
	slices.SortFunc(w.ExcludeOutboundCIDRs, comparePrefix)
	w.ExcludeOutboundCIDRs = slices.Compact(w.ExcludeOutboundCIDRs)
	for _, upstream := range meshConfig.Upstreams {
		upstream.Addresses = slices.Clone(upstream.Addresses)
		for i, addr := range upstream.Addresses {
			upstream.Addresses[i] = addr.Unmap()
		}
		slices.SortFunc(upstream.Addresses, netip.Addr.Compare)
		upstream.Addresses = slices.Compact(upstream.Addresses)
		w.Upstreams = append(w.Upstreams, upstream)
	}
	slices.SortStableFunc(w.Upstreams, func(a, b Upstream) int {
		return cmp.Or(strings.Compare(a.Name, b.Name), a.Listener.Compare(b.Listener))
	})
	if meshConfig.InboundPort != 0 {
		w.InboundPort = meshConfig.InboundPort
	}
	if meshConfig.OutboundPort != 0 {
		w.OutboundPort = meshConfig.OutboundPort
	}
	if w.Mode == "" {
		w.Mode = ModeTransparent
	}
	if w.OutboundPort == 0 {
		w.OutboundPort = DefaultOutboundPort
	}
	if w.Budget == 0 {
		w.Budget = DefaultBudget
	}
	for i, addr := range w.Addresses {
		w.Addresses[i] = addr.Unmap()
	}
	return w
}

// Validate reports the first field that cannot be represented in the kernel.
func (w Workload) Validate() error {
	switch w.Mode {
	case ModeTransparent, ModeDirect, ModeGateway:
	default:
		return fmt.Errorf("mode %q: want %s, %s or %s", w.Mode, ModeTransparent, ModeDirect, ModeGateway)
	}
	for name, guard := range map[string]Guard{"guard": w.Guard, "egress guard": cmp.Or(w.Egress, GuardOff)} {
		switch guard {
		case GuardOff, GuardAudit, GuardEnforce:
		default:
			return fmt.Errorf("%s %q: want %s, %s or %s", name, guard, GuardOff, GuardAudit, GuardEnforce)
		}
	}
	if w.OutboundPort == 0 {
		return errors.New("outbound port: must not be 0")
	}
	if w.InboundPort == w.OutboundPort {
		return fmt.Errorf("inbound port %d: the proxy's outbound listener has it too", w.InboundPort)
	}
	if err := w.validateProxies(); err != nil {
		return err
	}
	if err := w.validateRows(); err != nil {
		return err
	}
	if w.Budget > MaxBudget {
		return fmt.Errorf("budget %d: a workload has at most %d origin addresses", w.Budget, MaxBudget)
	}
	return w.validateAddresses()
}

func (w Workload) validateAddresses() error {
	for _, cidr := range w.ExcludeOutboundCIDRs {
		if !cidr.IsValid() {
			return errors.New("excluded CIDR: not a prefix")
		}
	}
	for _, addr := range w.Addresses {
		if !addr.IsValid() || addr.IsUnspecified() {
			return fmt.Errorf("address %q: not an address of a workload", addr)
		}
	}
	for _, upstream := range w.Upstreams {
		listener := upstream.Listener.Addr().Unmap()
		if upstream.Listener.Port() == 0 || !listener.IsLoopback() || EncodedPrefix4.Contains(listener) {
			return fmt.Errorf("upstream %q: listener %s: want a port and a loopback address outside of %s",
				upstream.Name, upstream.Listener, EncodedPrefix4)
		}
		for _, addr := range upstream.Addresses {
			if !addr.IsValid() || addr.IsUnspecified() {
				return fmt.Errorf("upstream %q: address %q: not a virtual IP", upstream.Name, addr)
			}
		}
	}
	return nil
}

// Equal reports whether two workloads give the same map rows.
func (w Workload) Equal(other Workload) bool {
	return w.Mode == other.Mode && w.ProxyUID == other.ProxyUID &&
		w.InboundPort == other.InboundPort && w.OutboundPort == other.OutboundPort &&
		w.DNS == other.DNS && w.Budget == other.Budget && w.Guard == other.Guard && w.Egress == other.Egress && w.Forward == other.Forward && w.Ephemeral == other.Ephemeral &&
		slices.Equal(w.ExcludeInboundPorts, other.ExcludeInboundPorts) &&
		slices.Equal(w.ExposedPorts, other.ExposedPorts) &&
		slices.Equal(w.ExcludeOutboundPorts, other.ExcludeOutboundPorts) &&
		slices.Equal(w.ExcludeOutboundCIDRs, other.ExcludeOutboundCIDRs) &&
		slices.Equal(w.ExcludeUIDs, other.ExcludeUIDs) &&
		slices.Equal(w.Addresses, other.Addresses) && slices.Equal(w.Broadcasts, other.Broadcasts) && w.Sources.Equal(other.Sources) && w.Sliced == other.Sliced && w.Service == other.Service &&
		slices.Equal(w.Seats, other.Seats) && slices.EqualFunc(w.Proxies, other.Proxies, Sidecar.equal) &&
		slices.EqualFunc(w.Upstreams, other.Upstreams, func(a, b Upstream) bool {
			return a.Name == b.Name && a.Listener == b.Listener && slices.Equal(a.Addresses, b.Addresses)
		})
}

func sorted[T uint16 | uint32](list []T) []T {
	slices.Sort(list)
	return slices.Compact(list)
}

func comparePrefix(a, b netip.Prefix) int {
	if c := a.Addr().Compare(b.Addr()); c != 0 {
		return c
	}
	return a.Bits() - b.Bits()
}
