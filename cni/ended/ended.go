// SPDX-License-Identifier: MPL-2.0

// Package ended finds the networks of ended allocations and whose end
// no plugin was told of, and takes them away as a runtime would have: by DEL.
//
// Nomad makes no DEL for an allocation that it finds ended when its client
// starts, as where the client was restarted while it waited for the tasks, or
// the power was cut. Lease, device, host ports, firewall rules, libcni's result
// and Weir's own record and programs stay then, and a new allocation with the
// same static port does not get its connections.
//
// That an allocation is over cannot be seen from a node without asking Nomad.
// What can be seen is that it has no network that anything uses: no process is
// in its namespace, by whatever path or none. Where no path leads to a
// namespace of it either, nothing can come to run there, and its network is
// taken away. Where one does, it may be over, or about to start a task: somebody
// has to say so.
package ended

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"

	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/weirmesh/weir/cni"
	"github.com/weirmesh/weir/redirect"
)

// Where a node keeps what is looked at, unless it is told otherwise.
const (
	DefaultCacheDir = "/var/lib/cni"
	DefaultNetNSDir = "/var/run/netns"
	DefaultCNIPath  = "/opt/cni/bin:/usr/libexec/cni" // Nomad's
)

// Node says where on a node everything is. Zero fields mean the default.
type Node struct {
	Paths    store.Paths
	CacheDir string    // of libcni
	NetNSDir string    // where Nomad makes namespaces
	CNIPath  string    // directories of plugins, as in Nomad's cni_path
	Notes    io.Writer // what plugins remark; nil: nowhere
}

// State says what is left of an attachment's namespace.
type State string

// The states of an attachment that nothing uses.
const (
	Gone  State = "gone"  // no path leads to a namespace of it
	Empty State = "empty" // a path does, and no process is there
)

// ErrInUse: something runs in the namespace, or a path leads there by now.
var ErrInUse = errors.New("it is in use")

// Attachment is an allocation's place in a network, which nothing uses.
type Attachment struct {
	Key     workload.AttachmentID `json:"key"`
	Job     workload.Job          `json:"job"`
	Network string                `json:"network"` // its name; empty where only the namespace is left
	NetNS   string                `json:"netns"`   // path
	State   State                 `json:"state"`
	Shadows []Shadow              `json:"shadows,omitempty"` // host ports that are somebody else's by now

	list       *libcni.NetworkConfigList // as it was at ADD; nil: libcni knows nothing of it
	args       map[string]any            // capabilities, as they were
	unread     error                     // why libcni's result cannot be read
	built      bool                      // the plugin has a record of the network
	known      bool                      // the data path has a record of the workload
	mount      string                    // where Nomad mounted a namespace, under the allocation's ID
	paths      []string                  // that led to a namespace of it
	cookies    []uint64                  // of namespaces of it
	interfaces []netInterface            // inside, as libcni has them
	addresses  []netip.Addr              // inside, where libcni has no interface
	ports      []hostPort                // that Nomad asked for
	portmap    bool                      // the plugin of that name maps them
}

// Find lists the attachments that nothing uses, in the order of their keys. What
// cannot be read comes back in the error, beside the rest.
func (n Node) Find() ([]Attachment, error) {
	all, problems := n.attachments()
	if len(all) == 0 {
		return nil, problems
	}
	uses, err := findNamespaceUsers()
	if err != nil {
		return nil, errors.Join(problems, err)
	}
	var list []Attachment
	var running []*Attachment
	for _, a := range all {
		if a.State, err = uses.of(a); errors.Is(err, ErrInUse) {
			running = append(running, a)
			continue
		} else if err != nil {
			problems = errors.Join(problems, fmt.Errorf("allocation %s: %w", a.Key.ContainerID, err))
			continue
		}
		list = append(list, *a)
	}
	return list, errors.Join(problems, findShadows(list, running))
}

// attachments joins what libcni, both kinds of records and Nomad's directory know.
func (n Node) attachments() ([]*Attachment, error) {
	found := make(map[workload.AttachmentID]*Attachment)
	at := func(key workload.AttachmentID) *Attachment {
		if found[key] == nil {
			found[key] = &Attachment{Key: key}
		}
		return found[key]
	}
	problems := []error{n.cached(at)}
	networks, err := cni.Networks(n.stateDir())
	problems = append(problems, err)
	for _, recorded := range networks {
		a := at(recorded.Key)
		a.built = true
		a.Job, a.Network = cmp.Or(a.Job, recorded.Job), cmp.Or(a.Network, recorded.Network)
		a.lived(recorded.NetNS, recorded.Cookie)
		a.portmap = !recorded.Maps
		if len(a.ports) == 0 && recorded.Cookie != 0 { // libcni forgot them
			a.ports, err = parsePorts(recorded.Ports)
			problems = append(problems, err)
		}
	}
	workloads, err := redirect.New(n.Paths).Records()
	problems = append(problems, err)
	for _, recorded := range workloads {
		a := at(recorded.Key)
		a.known = true
		a.Job, a.Network = cmp.Or(a.Job, recorded.Request.Job), cmp.Or(a.Network, recorded.Request.Network)
		a.lived(recorded.NetNS, recorded.Cookie)
	}
	problems = append(problems, n.named(at, found))
	return slices.SortedFunc(maps.Values(found), func(a, b *Attachment) int {
		return strings.Compare(a.Key.String(), b.Key.String())
	}), errors.Join(problems...)
}

// lived notes a namespace that the attachment had.
func (a *Attachment) lived(path string, cookie uint64) {
	if path != "" && !slices.Contains(a.paths, path) {
		a.paths = append(a.paths, path)
	}
	if cookie != 0 {
		a.cookies = append(a.cookies, cookie)
	}
	a.NetNS = cmp.Or(a.NetNS, path)
}

// cached adds what libcni remembers of Nomad's allocations.
func (n Node) cached(at func(workload.AttachmentID) *Attachment) error {
	library := n.library()
	attachments, err := library.GetCachedAttachments("")
	if err != nil {
		return fmt.Errorf("list CNI results: %w", err)
	}
	var problems []error
	for _, cached := range attachments {
		job := jobOf(cached.CniArgs)
		if job.AllocID == "" {
			continue // somebody else's
		}
		list, err := libcni.ConfListFromBytes(cached.Config)
		if err != nil {
			problems = append(problems, fmt.Errorf("CNI result of allocation %s: read its configuration: %w", job.AllocID, err))
			continue
		}
		a := at(workload.AttachmentID{ContainerID: cached.ContainerID, IfName: cached.IfName})
		a.Job, a.Network, a.list, a.args = job, cached.Network, list, cached.CapabilityArgs
		a.lived(cached.NetNS, 0)
		a.portmap = slices.ContainsFunc(list.Plugins, func(p *libcni.PluginConfig) bool { return p.Network.Type == "portmap" })
		if n.ofThisBoot(cached) {
			if a.ports, err = portsOf(cached.CapabilityArgs); err != nil {
				problems = append(problems, fmt.Errorf("CNI result of allocation %s: %w", job.AllocID, err))
			}
		}
		result, err := library.GetNetworkListCachedResult(list, a.runtime(""))
		if err == nil {
			err = a.describe(result)
		}
		if err != nil {
			a.unread = fmt.Errorf("read its CNI result: %w", err)
		}
	}
	return errors.Join(problems...)
}

// describe notes by what the allocation's end of the network is known again.
func (a *Attachment) describe(raw types.Result) error {
	if raw == nil {
		return fs.ErrNotExist // since the list was read
	}
	result, err := current.NewResultFromResult(raw)
	if err != nil {
		return err
	}
	for _, iface := range result.Interfaces {
		if iface.Sandbox == "" {
			continue
		}
		a.lived(iface.Sandbox, 0)
		if iface.Mac != "" {
			a.interfaces = append(a.interfaces, netInterface{iface.Name, strings.ToLower(iface.Mac)})
		}
	}
	for _, ip := range result.IPs {
		if addr, ok := netip.AddrFromSlice(ip.Address.IP); ok && len(a.interfaces) == 0 {
			a.addresses = append(a.addresses, addr.Unmap())
		}
	}
	return nil
}

// named adds the namespaces that Nomad made under the IDs of allocations.
func (n Node) named(at func(workload.AttachmentID) *Attachment, found map[workload.AttachmentID]*Attachment) error {
	allocID := regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
	dir := cmp.Or(n.NetNSDir, DefaultNetNSDir)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list namespaces: %w", err)
	}
	for _, entry := range entries {
		id, path := entry.Name(), filepath.Join(dir, entry.Name())
		if !allocID.MatchString(id) {
			continue
		}
		alone := true
		for key, a := range found {
			if key.ContainerID == id {
				alone = false
				a.mount = path
				a.lived(path, 0)
			}
		}
		if _, mounted, err := inodeOf(path); alone && mounted && err == nil {
			a := at(workload.AttachmentID{ContainerID: id})
			a.Job.AllocID, a.mount = id, path
			a.lived(path, 0)
		}
	}
	return nil
}

func jobOf(args [][2]string) (job workload.Job) {
	for _, arg := range args {
		job.SetArg(arg[0], arg[1])
	}
	return job
}

func (n Node) stateDir() string { return cmp.Or(n.Paths.StateDir, store.DefaultStateDir) }
