// SPDX-License-Identifier: MPL-2.0

package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/cni/network/attachment"
	"github.com/weirmesh/weir/cni/network/hostport"
	"github.com/weirmesh/weir/cni/network/nft"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/workload"
)

// Repair puts back the rules and host ports that somebody flushed, of every
// attachment on record whose namespace lives and whose device is there, and says what it
// put back. It calls no other plugin. A DEL takes the device away before its record:
// what it ended with the device is not put back. Host ports of attachments that have
// neither end: v0.1.0 left some.
func Repair(ctx context.Context, stateDir string) (repaired []string, err error) {
	n := New(attachment.Config{}, stateDir).Until(ctx)
	if _, err := os.Stat(n.records.Dir()); errors.Is(err, fs.ErrNotExist) {
		return nil, nil // locking would make the directory above
	}
	err = n.records.Locked(func() error {
		records, problem := n.records.ReadAll()
		return withHandle(func(h *netlink.Handle) error {
			return nft.WithNftables(func(conn *nftables.Conn) error {
				var held []hostport.HeldPort
				if repaired, held, err = repairAll(h, conn, records); err != nil || problem != nil {
					return errors.Join(problem, err)
				}
				ended, err := endLeftBehind(h, conn, records, held)
				repaired = append(repaired, ended...)
				return err
			})
		})
	})
	return repaired, err
}

// repairAll also returns the host ports that it found.
func repairAll(h *netlink.Handle, conn *nftables.Conn, records []*attachment.Record) (repaired []string, held []hostport.HeldPort, err error) {
	var problems []error
	seen := make(map[string]bool) // networks whose rules are there
	for _, r := range records {
		cookie, err := host.Cookie(r.NetNS)
		if err != nil || !r.Complete || cookie != r.Cookie {
			continue // it is for the next ADD, DEL or CHECK to see to it
		}
		// Rules serve a whole network; those for host ports come with
		// the first attachment that has some.
		if name := r.Name + " " + r.Mapper; !seen[name] {
			if device, err := find1(h, attachment.HostDevice(r.Key)); err != nil || device == nil {
				problems = append(problems, err)
				continue
			}
			seen[name] = true
			more, err := ensureRulesBy(r, conn)
			repaired = append(repaired, more...)
			if err != nil {
				problems = append(problems, fmt.Errorf("repair rules of network %s: %w", r.Name, err))
				continue
			}
			if held, err = hostport.Held(conn); err != nil {
				return repaired, nil, err
			}
		}
		more, err := restorePorts(h, conn, r, hostport.Missing(r, held))
		repaired = append(repaired, more...)
		problems = append(problems, err)
	}
	if len(seen) == 0 {
		held, err = hostport.Held(conn)
		problems = append(problems, err)
	}
	return repaired, held, errors.Join(problems...)
}

func restorePorts(h *netlink.Handle, conn *nftables.Conn, r *attachment.Record, missing []attachment.Port) (repaired []string, err error) {
	if len(missing) == 0 {
		return nil, nil // the device is not looked for each time
	}
	device, err := find1(h, attachment.HostDevice(r.Key))
	if device == nil {
		return nil, err
	}
	if repaired, err = hostport.Restore(r, conn, missing); err != nil {
		err = fmt.Errorf("repair host ports of %s: %w", r.Key, err)
	}
	return repaired, err
}

// endLeftBehind ends the host ports of attachments that are not on record and have no
// device: they lead to whoever gets the address next.
func endLeftBehind(h *netlink.Handle, conn *nftables.Conn, records []*attachment.Record, held []hostport.HeldPort) (ended []string, err error) {
	there := make(map[workload.AttachmentID]bool, len(records))
	for _, r := range records {
		there[r.Key] = true
	}
	var left []attachment.Port
	for _, port := range held {
		if port.Owner.ContainerID == "" {
			continue // not the plugin's
		}
		if _, looked := there[port.Owner]; !looked {
			device, err := find1(h, attachment.HostDevice(port.Owner))
			if err != nil {
				return nil, err
			}
			there[port.Owner] = device != nil // its record is lost
		}
		if !there[port.Owner] {
			left = append(left, port.Port)
			ended = append(ended, fmt.Sprintf("host port %s of %s, which has ended, removed", port, port.Owner))
		}
	}
	if err := hostport.DeleteElements(conn, left); err != nil {
		return nil, fmt.Errorf("remove host ports of ended allocations: %w", err)
	}
	return ended, hostport.ForgetFlows(&attachment.Record{Ports: left})
}
