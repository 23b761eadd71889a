// SPDX-License-Identifier: MPL-2.0

package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/vishvananda/netlink"

	"github.com/weirmesh/weir/redirect"
)

// Recorded is an attachment on record.
type Recorded struct {
	Attachment
	Network string          // its name
	Cookie  uint64          // of its namespace; 0 where the record is of an earlier boot
	Ports   json.RawMessage // PortMappings of its configuration
}

// Attachments lists the attachments on record, those of ended namespaces too.
// What of them cannot be read comes back in the error, beside the rest.
func Attachments(stateDir string) ([]Recorded, error) {
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	records, err := New(Config{}, stateDir).readRecords()
	list := make([]Recorded, 0, len(records))
	for _, r := range records {
		recorded := Recorded{Attachment: r.Attachment, Network: r.Name, Ports: r.PortMappings}
		if r.BootID == boot {
			recorded.Cookie = r.Cookie
		}
		list = append(list, recorded)
	}
	return list, err
}

// Forget removes an attachment that is on record, as Remove does, with what the
// record says of its network. path is CNI_PATH; empty leaves it to the record.
func Forget(stateDir string, key redirect.Key, path string) error {
	n := New(Config{}, stateDir)
	if _, err := n.readRecord(key); errors.Is(err, redirect.ErrUnknown) {
		return n.removeRecord(key) // one that cannot be read stands for nothing
	}
	return n.Remove(Attachment{Key: key, Path: path})
}

// Uninstall removes the bridges that the plugin made, with the rules for them,
// and its records and leases, and says what it removed. A bridge that has ports
// still serves allocations, and stays with all records; so does one that an
// operator made.
func Uninstall(stateDir string) (removed []string, err error) {
	n := New(Config{}, stateDir)
	if _, err := os.Stat(n.stateDir); errors.Is(err, fs.ErrNotExist) {
		return nil, nil // locking would make it
	}
	err = n.locked(func() error {
		inUse := false
		err := withHandle(func(h *netlink.Handle) error {
			links, err := h.LinkList()
			if err != nil {
				return fmt.Errorf("list devices: %w", err)
			}
			for _, link := range links {
				name := link.Attrs().Name
				if link.Type() != "bridge" || link.Attrs().Alias != alias {
					continue
				}
				ports, err := portsOf(h, name)
				if err != nil {
					return err
				}
				if ports > 0 {
					inUse = true
					continue
				}
				if err := removeRules(name); err != nil {
					return err
				}
				if err := h.LinkDel(link); err != nil {
					return fmt.Errorf("remove bridge %s: %w", name, err)
				}
				removed = append(removed, "bridge "+name)
			}
			return nil
		})
		if err != nil || inUse || n.serves() {
			return err
		}
		for _, dir := range []string{n.records(), filepath.Join(n.stateDir, "leases")} {
			if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err := os.RemoveAll(dir); err != nil {
				return err
			}
			removed = append(removed, "directory "+dir)
		}
		return os.Remove(filepath.Join(n.stateDir, "network.lock"))
	})
	return removed, err
}

// serves reports an attachment, to a bridge of whomever, whose namespace lives.
func (n *Network) serves() bool {
	records, _ := n.readRecords() // one that cannot be read cannot be served either
	return slices.ContainsFunc(records, func(r *record) bool {
		cookie, err := redirect.Cookie(r.NetNS)
		return err == nil && cookie == r.Cookie
	})
}
