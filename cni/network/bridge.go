// SPDX-License-Identifier: MPL-2.0

package network

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/cni/network/attachment"
	"golang.org/x/sys/unix"
)

// alias tells people who made a bridge. Whether it may be removed is decided by the
// record of it: another instance's bridge has the same alias.
const alias = "made by weir"

// makeBridge makes the bridge with an address of its own: one that takes its
// ports' would change it as they come and go. By this address, which is no other
// bridge's, the record knows it again.
func (n *Network) makeBridge(h *netlink.Handle, r *attachment.Record) error {
	address := make(net.HardwareAddr, 6)
	if _, err := rand.Read(address); err != nil {
		return err
	}
	address[0] = address[0]&^1 | 2 // one station, locally administered
	bridge := &netlink.Bridge{LinkAttrs: netlink.NewLinkAttrs()}
	bridge.Name, bridge.HardwareAddr, bridge.MTU = r.Bridge, address, r.MTU
	if r.MTU == 0 {
		bridge.MTU = nodeMTU(h)
	}
	// Before it is made: a crash leaves a record without a bridge, and not a bridge
	// that nobody removes.
	if err := n.recordBridge(r.Bridge, address); err != nil {
		return err
	}
	if err := h.LinkAdd(bridge); err != nil {
		err = errors.Join(err, n.forgetBridge(r.Bridge))
		if errors.Is(err, unix.EEXIST) { // made by another plugin meanwhile
			return nil
		}
		return fmt.Errorf("make bridge %s: %w", r.Bridge, err)
	}
	if err := h.LinkSetAlias(bridge, alias); err != nil {
		return fmt.Errorf("mark bridge %s: %w", r.Bridge, err)
	}
	return nil
}

// bridges is the directory with a file for each bridge that was made from here, with
// its hardware address.
func (n *Network) bridges() string { return filepath.Join(n.records.StateDir, "bridges") }

func (n *Network) recordBridge(name string, address net.HardwareAddr) error {
	if err := os.MkdirAll(n.bridges(), 0o700); err != nil {
		return fmt.Errorf("record bridge %s: %w", name, err)
	}
	path := filepath.Join(n.bridges(), name)
	if err := os.WriteFile(path+".tmp", []byte(address.String()+"\n"), 0o600); err != nil {
		return fmt.Errorf("record bridge %s: %w", name, err)
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		return fmt.Errorf("record bridge %s: %w", name, err)
	}
	return nil
}

// forgetBridge removes a bridge's record, and the directory with the last one.
func (n *Network) forgetBridge(name string) error {
	for _, path := range []string{filepath.Join(n.bridges(), name+".tmp"), filepath.Join(n.bridges(), name)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove record of bridge %s: %w", name, err)
		}
	}
	_ = os.Remove(n.bridges()) // it has others
	return nil
}

// madeHere reports whether the device is the bridge that a record of this state
// directory tells of.
func (n *Network) madeHere(link netlink.Link) (bool, error) {
	if link.Type() != "bridge" {
		return false, nil
	}
	address, err := os.ReadFile(filepath.Join(n.bridges(), link.Attrs().Name))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read record of bridge %s: %w", link.Attrs().Name, err)
	}
	return strings.TrimSpace(string(address)) == link.Attrs().HardwareAddr.String(), nil
}

// recordedBridges are the names of the bridges on record.
func (n *Network) recordedBridges() (names []string, err error) {
	entries, err := os.ReadDir(n.bridges())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list records of bridges: %w", err)
	}
	for _, entry := range entries {
		names = append(names, strings.TrimSuffix(entry.Name(), ".tmp"))
	}
	return names, nil
}
