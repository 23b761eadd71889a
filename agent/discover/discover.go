// SPDX-License-Identifier: MPL-2.0

// Package discover finds the allocations of the node: in libcni's results, among
// Nomad's and Docker's namespaces, and by their cgroups.
package discover

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/cni/request"
	"github.com/weirmesh/weir/redirect/workload"
)

// Attachment is one network of one allocation, as libcni remembers it: for
// every allocation of the node, also those for which no plugin of ours was
// called.
type Attachment struct {
	Key       workload.AttachmentID
	Network   string
	NetNS     string
	Job       workload.Job
	Addresses []netip.Addr
	Ports     []PortMapping
	Args      request.Args     // what a plugin of ours was asked for
	Conf      *request.Network // what that plugin was configured with; nil: libcni did not keep it
}

// Asked reports an attachment that a plugin of ours was called for, to put it
// under Weir.
func (a Attachment) Asked() bool { return !a.Args.None() }

// PortMapping is a port of the host that leads into the namespace.
type PortMapping struct {
	HostPort      uint16 `json:"hostPort"`
	ContainerPort uint16 `json:"containerPort"`
	Protocol      string `json:"protocol"`
}

// cacheEntry is the form in which libcni keeps a result.
type cacheEntry struct {
	Kind           string      `json:"kind"`
	ContainerID    string      `json:"containerId"`
	IfName         string      `json:"ifName"`
	Config         []byte      `json:"config"`
	NetworkName    string      `json:"networkName"`
	NetNS          string      `json:"netns"` // not before libcni 1.3
	Args           [][2]string `json:"cniArgs"`
	CapabilityArgs struct {
		PortMappings []PortMapping `json:"portMappings"`
	} `json:"capabilityArgs"`
	Result struct {
		Interfaces []struct {
			Name    string `json:"name"`
			Sandbox string `json:"sandbox"`
		} `json:"interfaces"`
		IPs []struct {
			Address   string `json:"address"`
			Interface *int   `json:"interface"`
		} `json:"ips"`
	} `json:"result"`
}

// ParseCache reads one file of libcni's. ok is false where it is not about an
// allocation of Nomad's.
func ParseCache(data []byte) (a Attachment, ok bool, err error) {
	var entry cacheEntry
	if err := json.Unmarshal(data, &entry); err != nil {
		return a, false, err
	}
	if entry.Kind != "cniCacheV1" || entry.ContainerID == "" || entry.IfName == "" {
		return a, false, nil
	}
	a = Attachment{
		Key:     workload.AttachmentID{ContainerID: entry.ContainerID, IfName: entry.IfName},
		Network: entry.NetworkName, NetNS: entry.NetNS, Ports: entry.CapabilityArgs.PortMappings,
	}
	a.Job, a.Args = request.SortArgs(entry.Args)
	switch conf, err := request.NetworkOf(entry.Config); {
	case err == nil:
		conf.Name = entry.NetworkName
		a.Conf = &conf
	case errors.Is(err, request.ErrNoPlugin):
		a.Args = request.Args{} // a job's author can write them all the same
	}
	for _, ip := range entry.Result.IPs {
		// An address of the bridge or of the host's end is not the workload's.
		if i := ip.Interface; i != nil && (*i < 0 || *i >= len(entry.Result.Interfaces) || entry.Result.Interfaces[*i].Sandbox == "") {
			continue
		}
		// Loopback is every namespace's.
		if prefix, err := netip.ParsePrefix(ip.Address); err == nil && !prefix.Addr().Unmap().IsLoopback() {
			a.Addresses = append(a.Addresses, prefix.Addr().Unmap())
		}
	}
	for _, iface := range entry.Result.Interfaces {
		if a.NetNS == "" {
			a.NetNS = iface.Sandbox
		}
	}
	return a, a.Job.AllocID != "", nil
}

// Cache reads libcni's results and keeps what has not changed since.
type Cache struct {
	Dir     string
	seen    map[string]cachedFile
	Halfway bool // libcni was writing a file when they were last read
}

// beingWritten is the age up to which a file that cannot be read counts as half
// of one: libcni writes in place.
const beingWritten = 200 * time.Millisecond

type cachedFile struct {
	size       int64
	modified   time.Time
	attachment Attachment
	ok         bool
	problem    string
}

// is reports whether the file was read as it is now.
func (f cachedFile) is(info fs.FileInfo) bool {
	return f.problem == "" && f.size == info.Size() && f.modified.Equal(info.ModTime())
}

// Read returns every attachment of an allocation, by key, and what could not
// be read: of those, what was last read, as long as the file is there. A directory that
// is not there is a node without allocations.
func (c *Cache) Read() (found map[workload.AttachmentID]Attachment, problems []string, err error) {
	c.Halfway = false
	entries, err := os.ReadDir(c.Dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("list CNI results: %w", err)
	}
	found = make(map[workload.AttachmentID]Attachment)
	fresh := make(map[string]cachedFile, len(entries))
	for _, entry := range entries {
		info, err := entry.Info()
		if errors.Is(err, fs.ErrNotExist) || err == nil && !info.Mode().IsRegular() {
			continue // removed meanwhile, or not libcni's
		}
		path, before := filepath.Join(c.Dir, entry.Name()), c.seen[entry.Name()]
		file := before
		switch {
		case err != nil:
			file.problem = fmt.Sprintf("CNI result %s: %v", path, err)
		case !before.is(info):
			file = readCacheFile(path, info)
		}
		if file.problem != "" { // no word of an end: what was last read stays
			file.attachment, file.ok = before.attachment, before.ok
		}
		fresh[entry.Name()] = file
		if age := time.Since(file.modified); file.problem != "" && age >= 0 && age < beingWritten {
			c.Halfway = true
		} else if file.problem != "" {
			problems = append(problems, file.problem)
		}
		if file.ok {
			found[file.attachment.Key] = file.attachment
		}
	}
	c.seen = fresh
	return found, problems, nil
}

// cacheLimit is larger than any result that libcni writes.
const cacheLimit = 4 << 20

func readCacheFile(path string, info fs.FileInfo) cachedFile {
	file := cachedFile{size: info.Size(), modified: info.ModTime()}
	if info.Size() > cacheLimit {
		file.problem = fmt.Sprintf("CNI result %s: %d bytes are too many", path, info.Size())
		return file
	}
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return file
	}
	if err == nil {
		file.attachment, file.ok, err = ParseCache(data)
	}
	if err != nil {
		// It may be half of one.
		file.problem = fmt.Sprintf("CNI result %s: %v", path, err)
	}
	return file
}

// Nomad's defaults of the range that dynamic ports are from.
const FirstDynamic, LastDynamic = 20000, 32000

// StaticPorts are the ports of the namespace that the job maps and that the
// request of the plugin could not name: a static port without "to" arrives
// there as "0". unnamed is how many of those it has. Nomad takes dynamic ports
// from a range of its own, and where the numbers add up that is not needed.
func (a Attachment) StaticPorts(unnamed int, inbound uint16) []uint16 {
	if unnamed == 0 {
		return nil
	}
	var same, static []uint16
	for _, mapping := range a.Ports {
		port := mapping.ContainerPort
		if port != mapping.HostPort || port == 0 || port == inbound {
			continue
		}
		same = append(same, port)
		if port < FirstDynamic || port > LastDynamic {
			static = append(static, port)
		}
	}
	if same = registration.SortedPorts(same); len(same) == unnamed {
		return same
	}
	return registration.SortedPorts(static)
}

// MappedPorts are all ports of the namespace that the job maps.
func (a Attachment) MappedPorts() []uint16 {
	var ports []uint16
	for _, mapping := range a.Ports {
		port := mapping.ContainerPort
		if port == 0 {
			port = mapping.HostPort
		}
		if port != 0 {
			ports = append(ports, port)
		}
	}
	return registration.SortedPorts(ports)
}
