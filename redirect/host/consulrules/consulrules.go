// SPDX-License-Identifier: MPL-2.0

// Package consulrules finds what Consul's own engines left in a network namespace.
package consulrules

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"unsafe"

	"github.com/weirmesh/weir/redirect/host/dump"
	"golang.org/x/sys/unix"
)

// What Consul's engines name their rules: chains in the nat tables of iptables
// (consul/sdk/iptables), a table of its own in nftables (consul/sdk/nftables).
const (
	consulChainPrefix = "CONSUL_PROXY_"
	consulTable       = "consul_tproxy"
)

// Found reports whether one of them redirects the namespace of the calling thread.
func Found() (bool, error) {
	if found, err := inNftables(); err != nil || found {
		return found, err
	}
	return inLegacyIptables()
}

// inNftables looks at the rules of nft and iptables-nft of the thread's
// namespace. A kernel without nf_tables has none.
func inNftables() (bool, error) {
	chains, err := dump.Nftables(unix.NFT_MSG_GETCHAIN, unix.AF_UNSPEC)
	if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("list nftables chains: %w", err)
	}
	for _, chain := range chains {
		for _, attribute := range chain {
			text := unix.ByteSliceToString(attribute.Value)
			if attribute.Attr.Type == unix.NFTA_CHAIN_NAME && strings.HasPrefix(text, consulChainPrefix) ||
				attribute.Attr.Type == unix.NFTA_CHAIN_TABLE && text == consulTable {
				return true, nil
			}
		}
	}
	return false, nil
}

// inLegacyIptables looks at the nat tables of the old iptables in the thread's
// namespace. A table exists only once somebody used it, and asking for one
// that does not would create it.
func inLegacyIptables() (bool, error) {
	for _, family := range []struct {
		names         string
		domain, level int
	}{
		{"/proc/thread-self/net/ip_tables_names", unix.AF_INET, unix.SOL_IP},
		{"/proc/thread-self/net/ip6_tables_names", unix.AF_INET6, unix.SOL_IPV6},
	} {
		names, err := os.ReadFile(family.names)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return false, fmt.Errorf("list iptables: %w", err)
		}
		if !bytes.Contains(names, []byte("nat\n")) {
			continue
		}
		table, err := readNatTable(family.domain, family.level)
		if err != nil {
			return false, err
		}
		if bytes.Contains(table, []byte(consulChainPrefix)) {
			return true, nil
		}
	}
	return false, nil
}

// readNatTable returns the entries of the nat table as the kernel keeps them.
// The structs are ipt_getinfo and ipt_get_entries of linux/netfilter_ipv4/
// ip_tables.h; those of IPv6 have the same layout and numbers.
func readNatTable(domain, level int) ([]byte, error) {
	const (
		getInfo    = 64 // IPT_SO_GET_INFO
		getEntries = 65 // IPT_SO_GET_ENTRIES
		nameSize   = 32
	)
	// iptables asks by a raw socket, which the egress guard refuses in this namespace.
	fd, err := unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open socket: %w", err)
	}
	defer unix.Close(fd)
	info := make([]byte, nameSize+4+20+20+4+4)
	copy(info, "nat")
	if err := getsockopt(fd, level, getInfo, info); err != nil {
		return nil, fmt.Errorf("read iptables nat table: %w", err)
	}
	size := binary.NativeEndian.Uint32(info[len(info)-4:])
	entries := make([]byte, nameSize+8+int(size))
	copy(entries, "nat")
	binary.NativeEndian.PutUint32(entries[nameSize:], size)
	if err := getsockopt(fd, level, getEntries, entries); err != nil {
		return nil, fmt.Errorf("read iptables nat table: %w", err)
	}
	return entries, nil
}

func getsockopt(fd, level, option int, buffer []byte) error {
	size := uint32(len(buffer))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option),
		uintptr(unsafe.Pointer(&buffer[0])), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}
