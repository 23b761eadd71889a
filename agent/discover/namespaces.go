// SPDX-License-Identifier: MPL-2.0

package discover

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/workload"
	"golang.org/x/sys/unix"
)

// Namespaces are where allocations live now, by allocation ID, as those say who
// make namespaces: Docker for its pause containers, Nomad for all else. libcni
// remembers only where an allocation lived when it was added.
type Namespaces struct {
	Docker map[string]string
	Nomad  map[string]string
}

// Find asks nobody: Docker's part is at hand, Nomad's is a directory. Where that cannot
// be listed, what was last found there stays.
func (n *Namespaces) Find(dir string, docker Containers) error {
	n.Docker = docker.NetNS
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("list namespaces: %w", err)
	}
	n.Nomad = make(map[string]string)
	for _, entry := range entries {
		if registration.IsAllocID(entry.Name()) {
			n.Nomad[entry.Name()] = filepath.Join(dir, entry.Name())
		}
	}
	return nil
}

// Of returns where an allocation lives now. recorded is where it was added;
// Docker knows better, Nomad gives the same path again.
func (n Namespaces) Of(id, recorded string) (path string, live bool) {
	if path, live = n.Docker[id]; live {
		return path, true
	}
	path, live = n.Nomad[id]
	if !live || IsGone(path) || recorded != "" && recorded != path && !IsGone(recorded) {
		return recorded, false
	}
	return path, true
}

// Others are the allocations with a living namespace that are not among these.
func (n Namespaces) Others(known map[string]bool) (list []Attachment) {
	for _, source := range []map[string]string{n.Docker, n.Nomad} {
		for id := range source {
			if known[id] {
				continue
			}
			known[id] = true
			if path, live := n.Of(id, ""); live {
				list = append(list, Attachment{
					Key: workload.AttachmentID{ContainerID: id, IfName: "eth0"}, NetNS: path, Job: workload.Job{AllocID: id},
				})
			}
		}
	}
	return list
}

// IsGone reports whether no namespace is mounted there for certain: what is left of one
// that died is an empty file, and one that cannot be looked at may live.
func IsGone(path string) bool {
	var stat unix.Statfs_t
	err := unix.Statfs(path, &stat)
	return errors.Is(err, fs.ErrNotExist) || err == nil && stat.Type != unix.NSFS_MAGIC
}

// There keeps those addresses that the namespace has: one that Docker made anew
// has none before Nomad adds it again.
func There(netns string, addresses []netip.Addr) ([]netip.Addr, error) {
	assigned, err := host.Addresses(netns)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(slices.Clone(addresses), func(addr netip.Addr) bool { return !slices.Contains(assigned, addr) }), nil
}
