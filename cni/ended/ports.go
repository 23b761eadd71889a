// SPDX-License-Identifier: MPL-2.0

package ended

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/cni/network/hostport"
	"github.com/weirmesh/weir/redirect/workload"
	"golang.org/x/sys/unix"
)

// Shadow is a host port of an ended allocation that is somebody else's by now.
// The rules of the older one come first, so connections to the port go to an
// address at which nobody answers.
type Shadow struct {
	Port     uint16                 `json:"port"`
	Protocol string                 `json:"protocol"`
	By       *workload.AttachmentID `json:"by"` // the running allocation; null: a process in the node's own network
	Job      workload.Job           `json:"job"`
}

// hostPort is a port of the node that is mapped to one of an allocation.
type hostPort struct {
	addr     netip.Addr // of the node; not valid: every one
	port     uint16
	protocol string
}

// meets reports whether one connection may be to both.
func (p hostPort) meets(other hostPort) bool {
	return p.port == other.port && p.protocol == other.protocol && (!p.addr.IsValid() || !other.addr.IsValid() || p.addr == other.addr)
}

// ofThisBoot reports whether libcni's result is younger than the kernel that runs:
// the file outlives a power cut, the rules for its host ports do not.
func (n Node) ofThisBoot(cached *libcni.NetworkAttachment) bool {
	var up unix.Timespec
	name := cached.Network + "-" + cached.ContainerID + "-" + cached.IfName
	info, err := os.Stat(filepath.Join(n.cacheDir(), "results", name))
	if err != nil || unix.ClockGettime(unix.CLOCK_BOOTTIME, &up) != nil {
		return true // what cannot be told is better told once too often
	}
	return info.ModTime().After(time.Now().Add(-time.Duration(up.Nano())))
}

// portsOf reads the capability that Nomad hands to libcni.
func portsOf(capabilities map[string]any) ([]hostPort, error) {
	if capabilities["portMappings"] == nil {
		return nil, nil
	}
	text, err := json.Marshal(capabilities["portMappings"])
	if err != nil {
		return nil, fmt.Errorf("read port mappings: %w", err)
	}
	return parsePorts(text)
}

// parsePorts reads them as the reference plugin portmap does.
func parsePorts(text json.RawMessage) (list []hostPort, err error) {
	if len(text) == 0 {
		return nil, nil
	}
	var mappings []struct {
		HostPort uint16
		Protocol string
		HostIP   string
	}
	if err := json.Unmarshal(text, &mappings); err != nil {
		return nil, fmt.Errorf("read port mappings: %w", err)
	}
	for _, mapping := range mappings {
		p := hostPort{port: mapping.HostPort, protocol: strings.ToLower(mapping.Protocol)}
		if p.port == 0 {
			continue // it is not reached from outside
		}
		if p.protocol == "" {
			p.protocol = "tcp"
		}
		if addr, err := netip.ParseAddr(mapping.HostIP); err == nil && !addr.IsUnspecified() {
			p.addr = addr.Unmap()
		}
		list = append(list, p)
	}
	return list, nil
}

// findShadows notes at the ended ones which of their host ports are a running
// allocation's, or have a listener in the node's own network.
func findShadows(ended []Attachment, running []*Attachment) error {
	if len(ended) == 0 {
		return nil
	}
	mapped, err := hostport.HostPorts()
	if err != nil {
		return fmt.Errorf("look for host ports of ended allocations: %w", err)
	}
	var listeners []hostPort
	for i := range ended {
		a := &ended[i]
		held := a.held(mapped)
		if len(held) > 0 && listeners == nil {
			if listeners, err = listening(); err != nil {
				return err
			}
		}
		for _, p := range held {
			a.noteShadow(p, listeners, running)
		}
	}
	return nil
}

// noteShadow notes a host port that somebody else has, once, whatever the families.
func (a *Attachment) noteShadow(p hostPort, listeners []hostPort, running []*Attachment) {
	shadow := Shadow{Port: p.port, Protocol: p.protocol}
	taken := slices.ContainsFunc(listeners, p.meets)
	for _, r := range running {
		if slices.ContainsFunc(r.ports, p.meets) {
			taken, shadow.By, shadow.Job = true, &r.Key, r.Job
		}
	}
	if taken && !slices.ContainsFunc(a.Shadows, func(s Shadow) bool { return s.Port == p.port && s.Protocol == p.protocol }) {
		a.Shadows = append(a.Shadows, shadow)
	}
}

// held are the host ports that lead to the attachment. Those that the plugin maps
// itself the kernel tells, where another may have taken one over; of the plugin
// portmap's rules only what they were made of is known.
func (a *Attachment) held(mapped []hostport.HostPort) (list []hostPort) {
	if a.portmap {
		list = slices.Clone(a.ports)
	}
	for _, m := range mapped {
		if m.Key != a.Key {
			continue
		}
		p := hostPort{port: m.Host.Port(), protocol: m.Protocol}
		if !m.Host.Addr().IsUnspecified() {
			p.addr = m.Host.Addr()
		}
		list = append(list, p)
	}
	return list
}

// listening are the ports of the caller's network at which somebody waits for
// connections or datagrams of others.
func listening() (list []hostPort, err error) {
	const listen, closed = 10, 7 // TCP_LISTEN; TCP_CLOSE, as of a UDP socket without a peer
	for _, each := range []struct {
		protocol string
		state    uint8
		dump     func(family uint8) ([]*netlink.Socket, error)
	}{{"tcp", listen, netlink.SocketDiagTCP}, {"udp", closed, netlink.SocketDiagUDP}} {
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			sockets, err := each.dump(family)
			if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) { // sockets come and go meanwhile
				return nil, fmt.Errorf("list %s sockets: %w", each.protocol, err)
			}
			for _, socket := range sockets {
				addr, ok := netip.AddrFromSlice(socket.ID.Source)
				if socket.State != each.state || !ok || addr.Unmap().IsLoopback() {
					continue
				}
				p := hostPort{port: socket.ID.SourcePort, protocol: each.protocol}
				if addr = addr.Unmap(); !addr.IsUnspecified() {
					p.addr = addr
				}
				list = append(list, p)
			}
		}
	}
	return list, nil
}
