// SPDX-License-Identifier: MPL-2.0

package network

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/cni/network/attachment"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
)

// Recorded is an attachment on record.
type Recorded struct {
	attachment.Attachment
	Network string          // its name
	Cookie  uint64          // of its namespace; 0 where the record is of an earlier boot
	Ports   json.RawMessage // PortMappings of its configuration
	Maps    bool            // in the plugin's own way: HostPorts has those in force
}

// Attachments lists the attachments on record, those of ended namespaces too.
// What of them cannot be read comes back in the error, beside the rest.
func Attachments(stateDir string) ([]Recorded, error) {
	boot, err := attachment.BootID()
	if err != nil {
		return nil, err
	}
	records, err := New(attachment.Config{}, stateDir).records.ReadAll()
	list := make([]Recorded, 0, len(records))
	for _, r := range records {
		recorded := Recorded{Attachment: r.Attachment, Network: r.Name, Ports: r.PortMappings, Maps: r.Mapper == attachment.MapperWeir}
		if r.BootID == boot {
			recorded.Cookie = r.Cookie
		}
		list = append(list, recorded)
	}
	return list, err
}

// Forget removes an attachment that is on record, as Remove does, with what the
// record says of its network. path is CNI_PATH; empty leaves it to the record.
func Forget(stateDir string, key workload.AttachmentID, path string) error {
	n := New(attachment.Config{}, stateDir)
	if _, err := n.records.Read(key); errors.Is(err, store.ErrUnknown) {
		return n.records.Remove(key) // one that cannot be read stands for nothing
	}
	return n.Remove(attachment.Attachment{Key: key, Path: path})
}

// Uninstall removes the bridges that were made from this state directory, with the
// rules for them, and its records and leases. removed says what; kept is what has
// the plugin's mark and no record here: another instance's, or made by a version
// that did not record bridges. A bridge that has ports still serves allocations, and
// stays with all records; so does one that an operator made.
func Uninstall(ctx context.Context, stateDir string) (removed, kept []string, err error) {
	n := New(attachment.Config{}, stateDir).Until(ctx)
	if _, err := os.Stat(n.records.StateDir); errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil // locking would make it
	}
	err = n.records.Locked(func() (err error) {
		inUse := false
		err = withHandle(func(h *netlink.Handle) error {
			removed, kept, inUse, err = n.removeBridges(h)
			return err
		})
		if err != nil || inUse || n.serves() {
			return err
		}
		for _, dir := range []string{n.records.Dir(), filepath.Join(n.records.StateDir, "leases")} {
			if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err := os.RemoveAll(dir); err != nil {
				return err
			}
			removed = append(removed, "directory "+dir)
		}
		return os.Remove(filepath.Join(n.records.StateDir, "network.lock"))
	})
	return removed, kept, err
}

// removeBridges removes those that no allocation is plugged into.
func (n *Network) removeBridges(h *netlink.Handle) (removed, kept []string, inUse bool, err error) {
	links, err := h.LinkList()
	if err != nil {
		return nil, nil, false, fmt.Errorf("list devices: %w", err)
	}
	recorded, err := n.recordedBridges()
	if err != nil {
		return nil, nil, false, err
	}
	used := map[string]bool{}
	for _, link := range links {
		name := link.Attrs().Name
		own, err := n.madeHere(link)
		if err != nil {
			return removed, kept, inUse, err
		}
		if !own {
			if link.Type() == "bridge" && link.Attrs().Alias == alias {
				kept = append(kept, "bridge "+name)
			}
			continue
		}
		if used[name], err = removeUnused(h, link); err != nil {
			return removed, kept, inUse, err
		}
		if used[name] {
			inUse = true
			continue
		}
		removed = append(removed, "bridge "+name)
	}
	for _, name := range recorded {
		if used[name] {
			continue
		}
		if err := n.forgetBridge(name); err != nil {
			return removed, kept, inUse, err
		}
	}
	return removed, kept, inUse, nil
}

// removeUnused removes a bridge and the rules for it, unless an allocation is plugged in.
func removeUnused(h *netlink.Handle, bridge netlink.Link) (used bool, err error) {
	name := bridge.Attrs().Name
	ports, err := portsOf(h, name)
	if err != nil || ports > 0 {
		return ports > 0, err
	}
	if err := removeRules(name); err != nil {
		return false, err
	}
	if err := h.LinkDel(bridge); err != nil {
		return false, fmt.Errorf("remove bridge %s: %w", name, err)
	}
	return false, nil
}

// serves reports an attachment, to a bridge of whomever, whose namespace lives.
func (n *Network) serves() bool {
	records, _ := n.records.ReadAll() // one that cannot be read cannot be served either
	return slices.ContainsFunc(records, func(r *attachment.Record) bool {
		cookie, err := host.Cookie(r.NetNS)
		return err == nil && cookie == r.Cookie
	})
}
