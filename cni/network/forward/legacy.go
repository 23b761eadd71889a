// SPDX-License-Identifier: MPL-2.0

package forward

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// legacyTables is the older iptables of one family, which nftables does not
// show (linux/netfilter_ipv4/ip_tables.h, and the same for ipv6).
type legacyTables struct {
	command string
	names   string // file with the tables that are in use
	family  int
	level   int
	entry   int // size of struct ipt_entry
	devices int // offset of its two device names
	next    int // offset of its next_offset
}

const (
	getInfo, getEntries = 64, 65 // IPT_SO_GET_INFO, IPT_SO_GET_ENTRIES
	nameSize            = 32
	hookForward         = 2
	verdictDrop         = -1 // -NF_DROP - 1
)

func legacy4() legacyTables {
	return legacyTables{"iptables", "/proc/thread-self/net/ip_tables_names", unix.AF_INET, unix.SOL_IP, 112, 16, 90}
}

func legacy6() legacyTables {
	return legacyTables{"ip6tables", "/proc/thread-self/net/ip6_tables_names", unix.AF_INET6, unix.SOL_IPV6, 168, 64, 142}
}

// info is struct ipt_getinfo.
type info struct {
	Name       [nameSize]byte
	ValidHooks uint32
	HookEntry  [5]uint32
	Underflow  [5]uint32
	NumEntries uint32
	Size       uint32
}

// dropsForward reports a FORWARD chain with policy DROP in which no rule names
// the bridge. Where nobody used the older iptables, its modules are not asked
// for: that would load them.
func (l legacyTables) dropsForward(bridge string) (bool, error) {
	names, err := os.ReadFile(l.names)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("list tables of %s-legacy: %w", l.command, err)
	}
	if !slices.Contains(strings.Fields(string(names)), "filter") {
		return false, nil
	}
	fd, err := unix.Socket(l.family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return false, fmt.Errorf("open %s-legacy: %w", l.command, err)
	}
	defer unix.Close(fd)
	table := info{}
	copy(table.Name[:], "filter")
	if err := get(fd, l.level, getInfo, unsafe.Slice((*byte)(unsafe.Pointer(&table)), unsafe.Sizeof(table))); err != nil {
		return false, fmt.Errorf("read %s-legacy: %w", l.command, err)
	}
	// struct ipt_get_entries: name, size, and the entries on a multiple of eight.
	const header = nameSize + 8
	data := make([]byte, header+table.Size)
	copy(data, "filter")
	binary.NativeEndian.PutUint32(data[nameSize:], table.Size)
	if err := get(fd, l.level, getEntries, data); err != nil {
		return false, fmt.Errorf("read rules of %s-legacy: %w", l.command, err)
	}
	return l.drops(data[header:], table, bridge)
}

func (l legacyTables) drops(entries []byte, table info, bridge string) (bool, error) {
	errShort := fmt.Errorf("read rules of %s-legacy: cut short", l.command)
	policy := int(table.Underflow[hookForward])
	// The policy is the rule that ends the chain: a standard target, whose
	// verdict follows its header of 32 bytes.
	if policy+l.entry+nameSize+4 > len(entries) {
		return false, errShort
	}
	if int32(binary.NativeEndian.Uint32(entries[policy+l.entry+nameSize:])) != verdictDrop {
		return false, nil
	}
	for at := 0; at < len(entries); {
		if at+l.entry > len(entries) {
			return false, errShort
		}
		for i := range 2 {
			name := entries[at+l.devices+i*unix.IFNAMSIZ:][:unix.IFNAMSIZ]
			if name, _, _ := bytes.Cut(name, []byte{0}); string(name) == bridge {
				return false, nil
			}
		}
		next := int(binary.NativeEndian.Uint16(entries[at+l.next:]))
		if next <= 0 {
			return false, errShort
		}
		at += next
	}
	return true, nil
}

func get(fd, level, option int, value []byte) error {
	size := uint32(len(value))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option),
		uintptr(unsafe.Pointer(&value[0])), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}
