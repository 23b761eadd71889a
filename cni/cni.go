// SPDX-License-Identifier: MPL-2.0

// Package cni is the plugin: it takes the requests that Nomad makes of
// Consul's own plugin, consul-cni, and turns each into a workload of package
// redirect.
//
// With a previous result it runs chained: behind a plugin that made the
// interface, whose result it returns unchanged. Without one it is the main
// plugin, and package network builds the allocation's network from the keys of
// the reference bridge plugin. What to do comes in CNI_ARGS, under the name
// CONSUL_IPTABLES_CONFIG or its twin CONSUL_NFTABLES_CONFIG, as Nomad writes
// it for a transparent_proxy block, or under keys weir.*, as a job's author
// writes them in network.cni.args. He can write Consul's argument himself too, so
// all of it is untrusted: every field is checked, and nothing in it names a
// path. The operator's policy says which keys of ours a job may set. The
// namespace comes from CNI_NETNS alone. An allocation without any of these
// arguments passes through untouched.
//
// The plugin never talks to Consul or to the agent. stdout carries the answer
// of CNI and nothing else; remarks for people go to stderr.
//
// Limitations of this version:
//   - of the reference bridge plugin it has no VLANs, no check of MAC
//     addresses and no way to choose one; a key that asks for it is refused;
//   - users are numbers: a name would have to be looked up in the task's image;
//   - ports are numbers and ranges "low:high", never the names of services;
//   - CIDRs are addresses and prefixes, never host names or netmasks;
//   - a CHECK or GC needs the CNI versions that have them, 0.4.0 and 1.1.0.
package cni

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/ns"
	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/weirmesh/weir/cni/network/attachment"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"

	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/weirmesh/weir/cni/request"
	"github.com/weirmesh/weir/redirect"
)

// Datapath is what the plugin needs of *redirect.Datapath.
type Datapath interface {
	Add(redirect.Attachment) error
	Remove(workload.AttachmentID) error
	Check(key workload.AttachmentID, netns string) (repairs []program.Repair, err error)
	GC(name string, valid []workload.AttachmentID) (removed []workload.AttachmentID, err error)
	InForce(netns string) (bool, error)
	Probe() error
}

// Network is what the plugin needs of *network.Network.
type Network interface {
	Add(attachment.Attachment) (result *current.Result, undo func() error, err error)
	Check(a attachment.Attachment, previous *current.Result) (repairs []string, err error)
	Remove(attachment.Attachment) error
	Owns(workload.AttachmentID) bool
	Collect(valid []workload.AttachmentID, path string) (removed []workload.AttachmentID, err error)
	Probe(path string) error
}

// Plugin answers the commands of CNI. All its fields are needed but Paths and
// ConfigDir.
type Plugin struct {
	// Open gives the data path whose state lies at the given paths.
	Open func(store.Paths) Datapath
	// Paths are the paths that the environment sets; they win over the
	// configuration's.
	Paths store.Paths
	// ConfigDir is where the operator's policy lies, as the environment says;
	// empty leaves it to the configuration and to request.DefaultConfigDir.
	ConfigDir string
	// RedirectedByConsul reports whether Consul's own rules are in a namespace.
	RedirectedByConsul func(netns string) (bool, error)
	// Network gives the network of a configuration, whose records lie below the
	// state directory.
	Network func(config attachment.Config, stateDir string) Network
	// AddressesIn lists the addresses that a namespace really has.
	AddressesIn func(netns string) ([]netip.Addr, error)

	Stdout io.Writer // the answer of CNI
	Stderr io.Writer // remarks
}

// Add redirects the allocation's namespace and prints the result: the previous
// one, or that of the network that it builds where there is none. It may be
// called again, also with a new namespace for an ID that is known, as long as no
// task runs in the old one's network. When it fails, nothing of the allocation is
// left behind.
func (p *Plugin) Add(cmd *skel.CmdArgs) error {
	conf, err := parseConfig(cmd.StdinData)
	if err != nil {
		return err
	}
	job, args := request.ParseArgs(cmd.Args)
	r := caller{job: job, containerID: cmd.ContainerID}
	asked, err := request.Read(job, args, conf.Network, p.ConfigDir)
	if err != nil {
		return r.requestError(err)
	}
	if conf.previous != nil {
		if err := conf.refuseInterfaceKeys(); err != nil {
			return err
		}
		return p.redirect(r, cmd, conf, asked)
	}
	undo, err := p.build(r, cmd, conf)
	if err != nil {
		return err
	}
	if err := p.redirect(r, cmd, conf, asked); err != nil {
		if err := undo(); err != nil {
			p.note(r, fmt.Sprintf("take the network back: %v", err))
		}
		return err
	}
	return nil
}

// redirect is the part of Add that a chained plugin has too.
func (p *Plugin) redirect(r caller, cmd *skel.CmdArgs, conf *netConf, asked *workload.Request) error {
	if asked == nil {
		if err := refuseOwnNetNS(cmd); err != nil {
			return err
		}
		if err := conf.previous.print(p.Stdout); err != nil {
			return r.stepError("print result", err)
		}
		return nil
	}
	wanted, err := r.attachment(cmd, conf, *asked)
	if err != nil {
		return err
	}
	datapath := p.open(conf)
	if err := datapath.Add(wanted); err != nil {
		return r.stepError("redirect namespace "+cmd.Netns, err)
	}
	p.note(r, asked.Notes...)
	if err := conf.previous.print(p.Stdout); err != nil {
		return r.stepError("print result", errors.Join(err, datapath.Remove(wanted.Key)))
	}
	return nil
}

// Del ends the redirection of the allocation. It needs neither CNI_ARGS nor a
// previous result nor a namespace, and it does not fail for what it cannot undo:
// a runtime that hears an error does not ask the plugins before this one to give
// back what is theirs. What is left is told, and ends with the namespace.
func (p *Plugin) Del(cmd *skel.CmdArgs) error {
	conf, err := decodeConfig(cmd.StdinData)
	if err != nil {
		return err
	}
	r := caller{containerID: cmd.ContainerID}
	// The rules of a namespace go before its network, and the network goes
	// also where they do not.
	if err := p.open(conf).Remove(keyOf(cmd)); err != nil {
		p.note(r, fmt.Sprintf("end redirection: %v", err))
	}
	p.tearDown(r, cmd, conf)
	return nil
}

// Check verifies that the allocation is redirected as it was asked for, and
// repairs in place what it can: an error makes Nomad throw the namespace of a
// running allocation away. So it has two answers beside success: an error for
// what is broken, and a remark where it could not look while the kernel redirects
// the namespace. An allocation without any mesh argument passes, and
// so does a namespace that Consul's own rules redirect. The arguments are only
// read closely where the record is lost.
func (p *Plugin) Check(cmd *skel.CmdArgs) error {
	conf, err := decodeConfig(cmd.StdinData)
	if err != nil {
		return err
	}
	job, args := request.ParseArgs(cmd.Args)
	r := caller{job: job, containerID: cmd.ContainerID}
	if err := p.checkNetwork(r, cmd, conf); err != nil {
		return err
	}
	if args.None() {
		return nil
	}
	datapath := p.open(conf)
	repairs, err := datapath.Check(keyOf(cmd), cmd.Netns)
	for _, what := range repairs {
		p.note(r, "repaired: "+what.String())
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, host.ErrNetNSGone), errors.Is(err, host.ErrHostNetNS):
		return r.stepError("check redirection", err) // it was looked at
	case errors.Is(err, store.ErrUnknown), errors.Is(err, store.ErrUnreadable), errors.Is(err, bpfmap.ErrNotLoaded):
		err = p.restore(r, cmd, args, datapath)
	default:
		err = r.stepError("check redirection", err)
	}
	if err != nil && p.inForce(cmd, datapath) {
		p.note(r, fmt.Sprintf("could not be checked or repaired, and is redirected all the same: %v", err))
		return nil
	}
	return err
}

// inForce reports whether the kernel redirects the namespace, whatever could not
// be looked at or written: an error would end a network that works.
func (p *Plugin) inForce(cmd *skel.CmdArgs, datapath Datapath) bool {
	redirected, err := datapath.InForce(cmd.Netns)
	return err == nil && redirected
}

// restore redirects anew an allocation whose record is lost, from what the
// runtime still knows of it. The namespace must be the one that the previous
// result describes: in an empty one there is nothing to restore.
func (p *Plugin) restore(r caller, cmd *skel.CmdArgs, args request.Args, datapath Datapath) error {
	consuls, err := p.RedirectedByConsul(cmd.Netns)
	if err != nil {
		return r.stepError("look for Consul's own rules in "+cmd.Netns, err)
	}
	if consuls {
		p.note(r, "redirected by Consul's own rules; left as it is")
		return nil
	}
	conf, err := parseConfig(cmd.StdinData)
	if err != nil {
		return err
	}
	if conf.previous == nil {
		return r.argError(types.ErrUnknownContainer, "prevResult: missing: the record of this allocation is lost and cannot be restored without it")
	}
	asked, err := request.Read(r.job, args, conf.Network, p.ConfigDir)
	if err != nil {
		return r.requestError(err)
	}
	wanted, err := r.attachment(cmd, conf, *asked)
	if err != nil {
		return err
	}
	present, err := p.AddressesIn(cmd.Netns)
	if err != nil {
		return r.stepError("list addresses in "+cmd.Netns, err)
	}
	for _, addr := range wanted.Request.Addresses {
		if !slices.Contains(present, addr) {
			return r.argError(types.ErrInvalidNetNS, fmt.Sprintf("address %s is not in %s: the namespace is not the one that ADD was given", addr, cmd.Netns))
		}
	}
	if err := datapath.Add(wanted); err != nil {
		return r.stepError("restore redirection", err)
	}
	p.note(r, "repaired: the record was lost; redirected anew from CNI_ARGS and prevResult")
	return nil
}

// Status reports whether an ADD would work now.
func (p *Plugin) Status(cmd *skel.CmdArgs) error {
	conf, err := parseConfig(cmd.StdinData)
	if err != nil {
		return err
	}
	if err := p.open(conf).Probe(); err != nil {
		return types.NewError(types.ErrPluginNotAvailable, fmt.Sprintf("probe data path: %v", err), "")
	}
	// Without a previous result, which STATUS never has, only the keys tell
	// whether the plugin is to build a network.
	if !conf.wantsInterface() {
		return nil
	}
	return p.probeNetwork(cmd, conf)
}

// GC ends the redirection of every attachment of the named network that is
// not in the list of valid ones. A request without a list is refused, an
// empty list is not.
func (p *Plugin) GC(cmd *skel.CmdArgs) error {
	conf, err := decodeConfig(cmd.StdinData)
	if err != nil {
		return err
	}
	valid, err := conf.validAttachments()
	if err != nil {
		return err
	}
	removed, err := p.open(conf).GC(conf.Name, valid)
	if err := p.collectNetwork(cmd, conf, valid); err != nil {
		return err
	}
	for _, key := range removed {
		p.note(caller{containerID: key.ContainerID}, "collected: no longer a valid attachment of network "+conf.Name)
	}
	if err != nil {
		return types.NewError(codeOf(err), fmt.Sprintf("network %s: collect attachments: %v", conf.Name, err), "")
	}
	return nil
}

// Funcs are the plugin's commands as package skel wants them.
func (p *Plugin) Funcs() skel.CNIFuncs {
	return skel.CNIFuncs{Add: p.Add, Del: p.Del, Check: p.Check, GC: p.GC, Status: p.Status}
}

func (p *Plugin) open(conf *netConf) Datapath {
	return p.Open(p.Paths.Or(conf.paths()))
}

// note tells remarks on stderr. A line that cannot be written there has
// nowhere else to go.
func (p *Plugin) note(r caller, remarks ...string) {
	for _, remark := range remarks {
		_, _ = fmt.Fprintf(p.Stderr, "weir: %s: %s\n", r, remark)
	}
}

// attachment is the request for the namespace of a call, with the addresses
// that the result names.
func (r caller) attachment(cmd *skel.CmdArgs, conf *netConf, asked workload.Request) (redirect.Attachment, error) {
	var err error
	if asked.Addresses, err = conf.previous.addresses(); err != nil {
		return redirect.Attachment{}, r.argError(types.ErrInvalidNetworkConfig, fmt.Sprintf("prevResult: %v", err))
	}
	return redirect.Attachment{Key: keyOf(cmd), NetNS: cmd.Netns, Request: asked}, nil
}

func keyOf(cmd *skel.CmdArgs) workload.AttachmentID {
	return workload.AttachmentID{ContainerID: cmd.ContainerID, IfName: cmd.IfName}
}

// refuseOwnNetNS makes skel's own refusal before a result is printed, so that
// stdout never holds both a result and an error.
func refuseOwnNetNS(cmd *skel.CmdArgs) error {
	if cmd.NetnsOverride == "1" || strings.EqualFold(cmd.NetnsOverride, "true") {
		return nil
	}
	own, err := ns.CheckNetNS(cmd.Netns)
	if err != nil {
		return err
	}
	if own {
		return types.NewError(types.ErrInvalidNetNS, fmt.Sprintf("namespace %s: it is the plugin's own", cmd.Netns), "")
	}
	return nil
}
