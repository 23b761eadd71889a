// SPDX-License-Identifier: MPL-2.0

package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"

	"github.com/hashicorp/consul/sdk/iptables"
	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test/bench/limit"
	"golang.org/x/sys/unix"
)

// The variants that are measured side by side.
const (
	direct      = "direct"       // the client dials the proxy itself: the floor
	directAgain = "direct again" // the floor once more: what differs is noise
	weir        = "Weir"
	consul      = "iptables-nft" // Consul's own engine, before v0.19.0 of its sdk
	nftables    = "nftables"     // the one that it has since
	least       = "limit"        // Weir's hooks with the least that could redirect
	inProcess   = "nftables in process"
	former      = "before" // Weir of an earlier revision: see -before
)

// Who runs what in a site. The proxy's user is the one of Envoy's image.
const (
	taskUID  = 1000
	proxyUID = 101
	dnsAddr  = "10.99.0.1"
	dnsPort  = 8600
)

// A variant redirects a site's traffic, or leaves it.
type variant struct {
	name     string
	outbound netip.AddrPort // what a client in the site dials
	inbound  netip.AddrPort // what a client outside dials
	redirect bool           // the proxy must see an origin
	install  func(*site) error
	remove   func(*site) error
}

// variants are the six of a comparison of traffic. Weir's programs are loaded
// only while Weir is measured: the floor is a machine without them.
func (b *bench) variants() []variant {
	nothing := func(*site) error { return nil }
	out, in := addrPort(proxyOut), addrPort(proxyIn)
	far, served := addrPort(remote), addrPort(service)
	return []variant{
		{direct, out, in, false, nothing, nothing},
		{directAgain, out, in, false, nothing, nothing},
		{least, far, served, true, b.installLimit, b.removeLimit},
		{weir, far, served, true, b.installWeir, b.removeWeir},
		{consul, far, served, true, installConsul, nothing},
		{nftables, far, served, true, b.installNFTables, nothing},
	}
}

// installLimit makes what Weir has in a namespace, the route to the encoded range,
// and attaches the programs of package limit.
func (b *bench) installLimit(s *site) error {
	cookie, err := host.Cookie(s.inside)
	if err != nil {
		return err
	}
	err = inNetNS(s.inside, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return fmt.Errorf("find lo: %w", err)
		}
		prefix := workload.EncodedPrefix4
		return netlink.RouteReplace(&netlink.Route{
			LinkIndex: lo.Attrs().Index, Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST,
			Dst: &net.IPNet{IP: prefix.Addr().AsSlice(), Mask: net.CIDRMask(prefix.Bits(), 32)}, Src: net.ParseIP(insideAddr),
		})
	})
	if err != nil {
		return err
	}
	b.limit = &limit.Config{
		Cgroup: filepath.Dir(b.task), NetNS: s.inside, Cookie: cookie,
		Remote: addrPort(remote).Addr(), Service: addrPort(service).Addr(), Encoded: workload.EncodedPrefix4.Addr().Next(),
		Port: addrPort(remote).Port(), Outbound: outboundPort, Inbound: inboundPort,
	}
	return b.limit.Attach()
}

func (b *bench) removeLimit(*site) error { return b.limit.Close() }

func (b *bench) installNFTables(s *site) error {
	_, _, err := b.peer.Setup(engineConfig(s))
	return err
}

func (b *bench) installWeir(s *site) error {
	if err := b.load(); err != nil {
		return err
	}
	return redirect.New(b.paths).Add(attachment(s))
}

func (b *bench) removeWeir(s *site) error {
	return errors.Join(redirect.New(b.paths).Remove(key(s)), b.unload())
}

func (b *bench) load() error {
	_, err := redirect.New(b.paths).Load()
	return err
}

func (b *bench) unload() error {
	_, err := redirect.New(b.paths).Unload()
	return err
}

func key(s *site) workload.AttachmentID {
	return workload.AttachmentID{ContainerID: s.name, IfName: "eth0"}
}

func attachment(s *site) redirect.Attachment {
	return redirect.Attachment{
		Key:   key(s),
		NetNS: s.inside,
		Request: workload.Request{
			Network:      "bench",
			Mode:         workload.ModeTransparent,
			ProxyUID:     proxyUID,
			InboundPort:  inboundPort,
			OutboundPort: outboundPort,
			DNS:          workload.DNS{Address: netip.MustParseAddr(dnsAddr), Port: dnsPort},
			Addresses:    []netip.Addr{netip.MustParseAddr(insideAddr)},
		},
	}
}

// engineConfig asks Consul's engine for the same as attachment asks Weir.
func engineConfig(s *site) iptables.Config {
	return iptables.Config{
		ConsulDNSIP:       dnsAddr,
		ConsulDNSPort:     dnsPort,
		ProxyUserID:       strconv.Itoa(proxyUID),
		ProxyInboundPort:  inboundPort,
		ProxyOutboundPort: outboundPort,
		NetNS:             s.inside,
	}
}

func installConsul(s *site) error {
	return iptables.Setup(engineConfig(s), false)
}

// preferNFT puts a directory first on PATH in which iptables is the nf_tables
// one, whatever the machine's alternatives say.
func preferNFT(dir string) error {
	for _, name := range []string{"iptables", "ip6tables"} {
		target, err := filepath.EvalSymlinks("/usr/sbin/" + name + "-nft")
		if err != nil {
			return fmt.Errorf("find %s-nft: %w", name, err)
		}
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return os.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}
