// SPDX-License-Identifier: MPL-2.0

// Package network builds an allocation's network in one process, as the
// reference plugins loopback, bridge and firewall do together: a bridge, a veth
// pair, lo, addresses, routes, masquerading, and an accept where the node drops
// what it forwards. Host ports, which the reference plugin portmap maps elsewhere,
// are elements of maps of nftables. Everything goes by netlink, and host-local is
// linked in; the only command is another IPAM plugin.
//
// Each step looks before it acts, so that the same code builds, builds again
// after a crash, and repairs what CHECK finds missing.
package network

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/weirmesh/weir/cni/network/attachment"
	"github.com/weirmesh/weir/cni/network/delegate"
	"github.com/weirmesh/weir/cni/network/forward"
	"github.com/weirmesh/weir/cni/network/hostport"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"

	current "github.com/containernetworking/cni/pkg/types/100"
)

// Network makes and removes attachments. It holds no state of its own: what it
// made is in the kernel and in the records below the state directory.
type Network struct {
	config  attachment.Config
	records attachment.Records
}

// New returns the network. Nothing is opened or changed.
func New(config attachment.Config, stateDir string) *Network {
	if stateDir == "" {
		stateDir = store.DefaultStateDir
	}
	return &Network{config: config, records: attachment.Records{StateDir: stateDir, Ctx: context.Background()}}
}

// Until returns the same network for who waits no longer than ctx lives: a change that
// waits for another process's is given up then, and one that has begun is finished, or
// undone.
func (n *Network) Until(ctx context.Context) *Network {
	bounded := *n
	bounded.records.Ctx = ctx
	return &bounded
}

// Add makes the attachment and returns its result. The same call twice is
// once; a known key with another namespace gives up all of the old one, and is
// refused with ErrInUse while tasks run in that: they would be left without a
// network. A call that fails leaves nothing of its own behind. undo takes back what
// this call made, and nothing that was there before it.
func (n *Network) Add(a attachment.Attachment) (result *current.Result, undo func() error, err error) {
	if err := delegate.Need(&n.config, a.Path); err != nil {
		return nil, nil, err
	}
	ns, err := openNamespace(a.NetNS)
	if err != nil {
		return nil, nil, err
	}
	defer ns.Close()
	old, err := n.records.Read(a.Key)
	known := err == nil
	if known && old.Complete && old.Cookie == ns.cookie {
		old.NetNS, old.Path = a.NetNS, a.Path
		if _, err := n.ensure(old, ns); err != nil {
			return nil, nil, err
		}
		return old.Result, func() error { return nil }, n.records.Write(old)
	}
	if !known && !errors.Is(err, store.ErrUnknown) {
		return nil, nil, err
	}
	if err := ns.refuseInUse(a.Key); err != nil {
		return nil, nil, fmt.Errorf("give up the old network of the same ID: %w", err)
	}
	if known {
		if a.Path != "" {
			old.Path = a.Path
		}
		// What was never finished may be such that it cannot be undone in
		// full either; what matters of it comes up again below.
		if err := n.teardown(old); err != nil && old.Complete {
			return nil, nil, fmt.Errorf("give up the old network of the same ID: %w", err)
		}
	}
	r := &attachment.Record{Config: n.config, Attachment: a, Cookie: ns.cookie, Fresh: !known}
	if r.PortMappings != nil {
		r.Mapper = attachment.MapperWeir
		if _, err := hostport.ParsePortMappings(r.PortMappings); err != nil {
			return nil, nil, fmt.Errorf("map host ports: %w", err)
		}
	}
	if err := n.build(r, ns); err != nil {
		return nil, nil, errors.Join(err, n.undoing().rollBack(r))
	}
	return r.Result, func() error { return n.undoing().teardown(r) }, nil
}

// undoing is the network for who takes back what a call made: that is not given up.
func (n *Network) undoing() *Network { return n.Until(context.WithoutCancel(n.records.Ctx)) }

// rollBack undoes a build that failed. Another plugin that refused its ADD
// refuses its DEL as likely, and has nothing then to be kept on record.
func (n *Network) rollBack(r *attachment.Record) error {
	ports, devices := n.disconnect(r)
	if ports != nil {
		return errors.Join(ports, devices, delegate.Release(n.records.Ctx, r))
	}
	if err := delegate.Release(n.records.Ctx, r); err != nil && r.Leased {
		return errors.Join(devices, err)
	}
	return errors.Join(devices, n.records.Remove(r.Key))
}

// build makes everything, and writes the record before the first change.
func (n *Network) build(r *attachment.Record, ns *namespace) error {
	if err := n.records.Write(r); err != nil {
		return err
	}
	leased, err := delegate.Lease(n.records.Ctx, r)
	if err != nil {
		return err
	}
	r.Leased = true
	if r.Result, err = r.ResultOf(leased); err != nil {
		return err
	}
	if _, err := n.ensure(r, ns); err != nil {
		return err
	}
	if err := hostport.Map(r, n.records); err != nil {
		return err
	}
	r.Complete = true
	return n.records.Write(r)
}

// Check verifies the attachment and repairs what it can in place; the texts say
// what. previous is the result that the runtime kept, for where the record is
// lost; it may be nil. redirect.ErrNetNSGone says that the namespace is not the
// one that was built.
func (n *Network) Check(a attachment.Attachment, previous *current.Result) (repairs []string, err error) {
	ns, err := openNamespace(a.NetNS)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	r, err := n.records.Read(a.Key)
	if errors.Is(err, store.ErrUnknown) {
		if r, err = n.restore(a, previous, ns); err == nil {
			repairs = append(repairs, "the record of the network was lost; written anew from the previous result")
		}
	}
	if err != nil {
		return nil, err
	}
	if !r.Complete {
		return nil, fmt.Errorf("network of %s was never finished: %w", a.Key, host.ErrNetNSGone)
	}
	if r.Cookie != ns.cookie {
		return nil, fmt.Errorf("namespace %s was replaced since ADD: %w", a.NetNS, host.ErrNetNSGone)
	}
	r.NetNS, r.Path = a.NetNS, a.Path
	did, err := n.ensure(r, ns)
	repairs = append(repairs, did...)
	if err != nil {
		return repairs, err
	}
	did, err = delegate.CheckLease(n.records.Ctx, r)
	repairs = append(repairs, did...)
	if err != nil {
		return repairs, err
	}
	did, err = hostport.Check(r, n.records)
	return append(repairs, did...), errors.Join(err, n.records.Write(r))
}

// restore makes a record from what the runtime still knows. The interface must
// be in the namespace: an empty namespace has nothing to restore.
func (n *Network) restore(a attachment.Attachment, previous *current.Result, ns *namespace) (*attachment.Record, error) {
	if previous == nil {
		return nil, fmt.Errorf("network of %s: its record is lost, and there is no previous result: %w", a.Key, store.ErrUnknown)
	}
	there, err := ns.has(a.Key.IfName)
	if err != nil {
		return nil, err
	}
	if !there {
		return nil, fmt.Errorf("namespace %s has no %s: %w", a.NetNS, a.Key.IfName, host.ErrNetNSGone)
	}
	r := &attachment.Record{Config: n.config, Attachment: a, Cookie: ns.cookie, Complete: true}
	if r.Result, err = r.ResultOf(previous); err != nil || r.PortMappings == nil {
		return r, err
	}
	if r.Mapper = attachment.MapperWeir; hostport.HasPortmapTable() && hostport.Portmap(n.records.Ctx, r, "CHECK") == nil {
		r.Mapper = attachment.MapperPortmap
		return r, nil
	}
	r.Ports, err = hostport.Wanted(r)
	return r, err
}

// Remove takes the attachment away, as far as it gets; it asks neither for the
// namespace nor for a record. What it could not do comes back, and stays in
// the record for a later Collect or Add of the same key.
func (n *Network) Remove(a attachment.Attachment) error {
	r, unknown := n.records.Read(a.Key)
	if unknown != nil {
		r = &attachment.Record{Config: n.config, Attachment: a, Lost: true}
	}
	if a.Path != "" {
		r.Path = a.Path
	}
	err := n.teardown(r)
	if err != nil && unknown == nil {
		r.Complete = false
		err = errors.Join(err, n.records.Write(r))
	}
	return err
}

// teardown undoes build. The record goes last, and only when nothing is left.
func (n *Network) teardown(r *attachment.Record) error {
	ports, devices := n.disconnect(r)
	if err := errors.Join(ports, devices, delegate.Release(n.records.Ctx, r)); err != nil {
		return err
	}
	return n.records.Remove(r.Key)
}

// Owns reports whether anything of the attachment is on the node.
func (n *Network) Owns(key workload.AttachmentID) bool {
	_, err := n.records.Read(key)
	return !errors.Is(err, store.ErrUnknown) || hasDevice(attachment.HostDevice(key))
}

// Collect removes the network's attachments that are not in valid, and the
// leases of host-local that belong to none of them.
func (n *Network) Collect(valid []workload.AttachmentID, path string) (removed []workload.AttachmentID, err error) {
	records, err := n.records.ReadAll()
	problems := []error{err}
	for _, r := range records {
		if r.Name != n.config.Name || slices.Contains(valid, r.Key) {
			continue
		}
		if path != "" {
			r.Path = path
		}
		if err := n.teardown(r); err != nil {
			problems = append(problems, fmt.Errorf("remove network of %s: %w", r.Key, err))
			continue
		}
		removed = append(removed, r.Key)
	}
	return removed, errors.Join(append(problems, delegate.CollectLeases(n.records.Ctx, n.config, valid, path))...)
}

// Probe reports whether an Add would find what it needs on the node.
func (n *Network) Probe(path string) error {
	if err := delegate.Need(&n.config, path); err != nil {
		return err
	}
	return forward.ProbeForward(n.config)
}
