// SPDX-License-Identifier: MPL-2.0

// Package hostport maps host ports to allocations, as elements of maps of nftables.
package hostport

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/weirmesh/weir/cni/network/attachment"
	"github.com/weirmesh/weir/cni/network/nft"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"golang.org/x/sys/unix"
)

// portMapping is a host port as the runtime asks for it, by the capability portMappings.
type portMapping struct {
	HostPort      uint16 `json:"hostPort"`
	ContainerPort uint16 `json:"containerPort"`
	Protocol      string `json:"protocol"`
	HostIP        string `json:"hostIP,omitempty"`
}

// ParsePortMappings reads what the runtime asks for.
func ParsePortMappings(raw json.RawMessage) (list []portMapping, err error) {
	if raw == nil {
		return nil, nil
	}
	if err := json.Unmarshal(raw, &list); err != nil {
		return nil, fmt.Errorf("read portMappings: %w", err)
	}
	for i, m := range list {
		if _, err := m.Number(); err != nil {
			return nil, err
		}
		if m.HostPort == 0 || m.ContainerPort == 0 {
			return nil, fmt.Errorf("portMappings: hostPort %d, containerPort %d: want both", m.HostPort, m.ContainerPort)
		}
		if m.HostIP == "" {
			continue
		}
		ip, err := netip.ParseAddr(m.HostIP)
		if err != nil {
			return nil, fmt.Errorf("portMappings: host port %d: hostIP: %w", m.HostPort, err)
		}
		list[i].HostIP = ip.Unmap().WithZone("").String()
	}
	return list, nil
}

func (m portMapping) Number() (uint8, error) {
	switch strings.ToLower(m.Protocol) {
	case "", "tcp":
		return unix.IPPROTO_TCP, nil
	case "udp":
		return unix.IPPROTO_UDP, nil
	case "sctp":
		return unix.IPPROTO_SCTP, nil
	}
	return 0, fmt.Errorf("portMappings: host port %d: protocol %q: want tcp, udp or sctp", m.HostPort, m.Protocol)
}

// Wanted are the translations that the mappings ask for: in each family in
// which the allocation has an address, to the first address of that family.
func Wanted(r *attachment.Record) (list []attachment.Port, err error) {
	mappings, err := ParsePortMappings(r.PortMappings)
	if err != nil || r.Result == nil {
		return nil, err
	}
	for _, four := range []bool{true, false} {
		i := slices.IndexFunc(r.Result.IPs, func(ip *attachment.IpConfig) bool { return (ip.Address.IP.To4() != nil) == four })
		if i < 0 {
			continue
		}
		container, _ := netip.AddrFromSlice(r.Result.IPs[i].Address.IP)
		host := netip.IPv6Unspecified()
		if four {
			host = netip.IPv4Unspecified()
		}
		for _, m := range mappings {
			on := host
			if m.HostIP != "" {
				if on = netip.MustParseAddr(m.HostIP); on.Is4() != four { // checked by parsePortMappings
					continue
				}
			}
			protocol, err := m.Number()
			if err != nil {
				return nil, err
			}
			list = append(list, attachment.Port{
				Protocol: protocol, Host: netip.AddrPortFrom(on, m.HostPort),
				Container: netip.AddrPortFrom(container.Unmap(), m.ContainerPort),
			})
		}
	}
	return list, nil
}

// Map puts the translations in force, all in one transaction. A port that
// another attachment holds is taken over: the runtime gives a port to one
// allocation at a time, so the other one has ended, whatever of it is left.
func Map(r *attachment.Record, records attachment.Records) (err error) {
	if r.Ports, err = Wanted(r); err != nil || len(r.Ports) == 0 {
		return err
	}
	r.Mapper = attachment.MapperWeir
	// On record before the first is in force, for whoever ends a half-made one.
	if err := records.Write(r); err != nil {
		return err
	}
	err = records.Locked(func() error {
		return nft.WithNftables(func(conn *nftables.Conn) error {
			err := addElements(r, conn, r.Ports)
			if errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EEXIST) {
				if err = takeOver(r, records, conn); err == nil {
					err = addElements(r, conn, r.Ports)
				}
			}
			return err
		})
	})
	if err != nil {
		return fmt.Errorf("map host ports: %w", err)
	}
	return ForgetFlows(r)
}

func addElements(r *attachment.Record, conn *nftables.Conn, ports []attachment.Port) error {
	for _, m := range portMaps() {
		if elements := m.elements(ports, r.Key); len(elements) > 0 {
			if err := conn.SetAddElements(m.set, elements); err != nil {
				return err
			}
		}
	}
	return conn.Flush()
}

// takeOver frees the ports of this attachment that others hold, in the kernel
// and on their records, so that their DEL does not end what is somebody else's now.
func takeOver(r *attachment.Record, records attachment.Records, conn *nftables.Conn) error {
	held, err := Held(conn)
	if err != nil {
		return err
	}
	lost := make(map[workload.AttachmentID][]attachment.Port)
	for _, wanted := range r.Ports {
		i := slices.IndexFunc(held, func(h HeldPort) bool { return h.SameHost(wanted) && h.Container != wanted.Container })
		if i >= 0 {
			lost[held[i].Owner] = append(lost[held[i].Owner], held[i].Port)
		}
	}
	for owner, ports := range lost {
		if err := DeleteElements(conn, ports); err != nil {
			return err
		}
		other, err := records.Read(owner)
		if errors.Is(err, store.ErrUnknown) {
			continue
		}
		if err != nil {
			return err
		}
		other.Ports = slices.DeleteFunc(other.Ports, func(p attachment.Port) bool { return slices.Contains(ports, p) })
		if err := records.Write(other); err != nil {
			return err
		}
	}
	return nil
}

// Unmap ends the translations that are on record by now: another attachment may have
// taken some over since the caller read it. Those of an attachment whose record is lost
// are told by the name that each carries. The caller holds the lock of the records, and
// calls [ForgetFlows] without it.
func Unmap(r *attachment.Record, records attachment.Records) error {
	if r.Mapper == attachment.MapperPortmap || len(r.Ports) == 0 && !r.Lost {
		return nil
	}
	if now, err := records.Read(r.Key); err == nil {
		r.Ports = now.Ports
	}
	err := nft.WithNftables(func(conn *nftables.Conn) error {
		if err := recallPorts(r, conn); err != nil {
			return err
		}
		return DeleteElements(conn, r.Ports)
	})
	if err != nil {
		return fmt.Errorf("remove host ports: %w", err)
	}
	return nil
}

// recallPorts reads the ports of an attachment whose record is lost from the translations.
func recallPorts(r *attachment.Record, conn *nftables.Conn) error {
	if !r.Lost {
		return nil
	}
	held, err := Held(conn)
	if err != nil {
		return err
	}
	for _, h := range held {
		if h.Owner == r.Key {
			r.Ports = append(r.Ports, h.Port)
		}
	}
	return nil
}

// DeleteElements takes translations away, in one transaction; where one of them
// is gone already, each in its own.
func DeleteElements(conn *nftables.Conn, ports []attachment.Port) error {
	if len(ports) == 0 {
		return nil
	}
	for _, m := range portMaps() {
		if err := m.queueDelete(conn, ports); err != nil {
			return err
		}
	}
	err := conn.Flush()
	if !errors.Is(err, unix.ENOENT) {
		return err
	}
	for _, m := range portMaps() {
		for _, port := range ports {
			if err := m.queueDelete(conn, []attachment.Port{port}); err != nil {
				return err
			}
			if err := conn.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
				return err
			}
		}
	}
	return nil
}

func (m portMap) queueDelete(conn *nftables.Conn, ports []attachment.Port) error {
	elements := m.elements(ports, workload.AttachmentID{})
	for i := range elements {
		elements[i] = nftables.SetElement{Key: elements[i].Key}
	}
	if len(elements) == 0 {
		return nil
	}
	return conn.SetDeleteElements(m.set, elements)
}

// Check puts back the translations that are missing.
func Check(r *attachment.Record, records attachment.Records) (repaired []string, err error) {
	if r.Mapper == attachment.MapperPortmap {
		return checkPortmap(records.Ctx, r)
	}
	err = records.Locked(func() error {
		return nft.WithNftables(func(conn *nftables.Conn) error {
			held, err := Held(conn)
			if err == nil {
				repaired, err = Restore(r, conn, Missing(r, held))
			}
			return err
		})
	})
	if err != nil {
		return nil, fmt.Errorf("check host ports: %w", err)
	}
	return repaired, nil
}

// Missing are those that nobody holds. One that another attachment holds by now is that
// one's.
func Missing(r *attachment.Record, held []HeldPort) []attachment.Port {
	return slices.DeleteFunc(slices.Clone(r.Ports), func(p attachment.Port) bool {
		return slices.ContainsFunc(held, func(h HeldPort) bool { return h.SameHost(p) })
	})
}

// Restore puts back those that are missing.
func Restore(r *attachment.Record, conn *nftables.Conn, missing []attachment.Port) (repaired []string, err error) {
	if len(missing) == 0 {
		return nil, nil
	}
	for _, p := range missing {
		repaired = append(repaired, "host port "+p.String())
	}
	return repaired, addElements(r, conn, missing)
}

// HeldPort is a translation as the kernel has it.
type HeldPort struct {
	attachment.Port
	Owner workload.AttachmentID
}

// HostPort is a port of the node that is an attachment's, as the kernel has it.
type HostPort struct {
	Key      workload.AttachmentID
	Protocol string
	Host     netip.AddrPort // unspecified: every address of the family
}

// HostPorts lists those that are mapped without the plugin portmap, of all attachments.
func HostPorts() (list []HostPort, err error) {
	err = nft.WithNftables(func(conn *nftables.Conn) error {
		held, err := Held(conn)
		for _, h := range held {
			list = append(list, HostPort{Key: h.Owner, Protocol: attachment.ProtocolNames()[h.Protocol], Host: h.Host})
		}
		return err
	})
	return list, err
}

// Held reads all of the node; none where there are no maps.
func Held(conn *nftables.Conn) (list []HeldPort, err error) {
	chains, err := nft.ListChains(conn) // the library does not tell a map that is not there from another error
	if err != nil || !slices.ContainsFunc(chains, func(c *nftables.Chain) bool {
		return c.Name == portChain && c.Table.Name == nft.Table && c.Table.Family == nftables.TableFamilyINet
	}) {
		return nil, err
	}
	for _, m := range portMaps() {
		elements, err := conn.GetSetElements(m.set)
		if err != nil {
			return nil, fmt.Errorf("list %s: %w", m.set.Name, err)
		}
		for _, element := range elements {
			if held, ok := m.decode(element); ok {
				list = append(list, held)
			}
		}
	}
	return list, nil
}

// portOf writes a port as nftables has it in a key: two bytes in network order, filled up to four.
func portOf(port uint16) []byte { return binary.BigEndian.AppendUint32(nil, uint32(port)<<16) }
