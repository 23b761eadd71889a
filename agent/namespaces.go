// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/workload"
	"golang.org/x/sys/unix"
)

// namespaces are where allocations live now, by allocation ID, as those say who
// make namespaces: Docker for its pause containers, Nomad for all else. libcni
// remembers only where an allocation lived when it was added.
type namespaces struct {
	docker map[string]string
	nomad  map[string]string
}

// findNamespaces asks nobody: Docker's part is at hand, Nomad's is a directory.
func findNamespaces(dir string, docker containers) (namespaces, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return namespaces{}, fmt.Errorf("list namespaces: %w", err)
	}
	found := namespaces{docker: docker.NetNS, nomad: make(map[string]string)}
	for _, entry := range entries {
		if isAllocID(entry.Name()) {
			found.nomad[entry.Name()] = filepath.Join(dir, entry.Name())
		}
	}
	return found, nil
}

// of returns where an allocation lives now. recorded is where it was added;
// Docker knows better, Nomad gives the same path again.
func (n namespaces) of(id, recorded string) (path string, live bool) {
	if path, live = n.docker[id]; live {
		return path, true
	}
	path, live = n.nomad[id]
	if !live || !isNamespace(path) || recorded != "" && recorded != path && isNamespace(recorded) {
		return recorded, false
	}
	return path, true
}

// others are the allocations with a living namespace that are not among these.
func (n namespaces) others(known map[string]bool) (list []attachment) {
	for _, source := range []map[string]string{n.docker, n.nomad} {
		for id := range source {
			if known[id] {
				continue
			}
			known[id] = true
			if path, live := n.of(id, ""); live {
				list = append(list, attachment{
					Key: workload.AttachmentID{ContainerID: id, IfName: "eth0"}, NetNS: path, Job: workload.Job{AllocID: id},
				})
			}
		}
	}
	return list
}

// isNamespace reports whether a namespace is mounted there: what is left of one
// that died is an empty file.
func isNamespace(path string) bool {
	var stat unix.Statfs_t
	return unix.Statfs(path, &stat) == nil && stat.Type == unix.NSFS_MAGIC
}

// leftBehind says what became of an allocation for which Nomad made no DEL: one
// that it found ended when its client started, as after a power cut.
func leftBehind() health.Problem {
	return health.NewProblem(health.ProblemLeftBehind, "'weir gc' takes away what is left", "it has ended and its namespace is gone, but nobody ended its network")
}

// isGone reports whether no namespace is mounted there for certain: one that
// cannot be looked at may live.
func isGone(path string) bool {
	var stat unix.Statfs_t
	err := unix.Statfs(path, &stat)
	return errors.Is(err, fs.ErrNotExist) || err == nil && stat.Type != unix.NSFS_MAGIC
}

// there keeps those addresses that the namespace has: one that Docker made anew
// has none before Nomad adds it again.
func there(netns string, addresses []netip.Addr) ([]netip.Addr, error) {
	assigned, err := host.Addresses(netns)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(slices.Clone(addresses), func(addr netip.Addr) bool { return !slices.Contains(assigned, addr) }), nil
}
