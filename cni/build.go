// SPDX-License-Identifier: MPL-2.0

package cni

import (
	"errors"
	"fmt"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/weirmesh/weir/cni/network/attachment"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
)

// build makes the allocation's network and puts its result where a chained
// plugin has the previous one. undo takes back what it made.
func (p *Plugin) build(r caller, cmd *skel.CmdArgs, conf *netConf) (undo func() error, err error) {
	if err := refuseOwnNetNS(cmd); err != nil {
		return nil, err
	}
	net, err := p.network(conf)
	if err != nil {
		return nil, err
	}
	built, undo, err := net.Add(attachmentOf(cmd))
	if err != nil {
		return nil, r.networkError("build network "+conf.Name, err)
	}
	conf.previous = ownResult(built, conf.CNIVersion)
	return undo, nil
}

// tearDown removes the network where the plugin built it. It never fails: what
// could not be removed is told, and left for a GC.
func (p *Plugin) tearDown(r caller, cmd *skel.CmdArgs, conf *netConf) {
	if net, own := p.ownNetwork(cmd, conf); own {
		if err := net.Remove(attachmentOf(cmd)); err != nil {
			p.note(r, fmt.Sprintf("remove network %s: %v", conf.Name, err))
		}
	}
}

// checkNetwork verifies the network where the plugin built it.
func (p *Plugin) checkNetwork(r caller, cmd *skel.CmdArgs, conf *netConf) error {
	net, own := p.ownNetwork(cmd, conf)
	if !own {
		return nil
	}
	repairs, err := net.Check(attachmentOf(cmd), conf.lastResult())
	for _, what := range repairs {
		p.note(r, "repaired: "+what)
	}
	// Whoever cannot write a record or take the lock has seen nothing that is wrong.
	if _, unseen := inspect.CouldNotLook(err); unseen && !errors.Is(err, host.ErrNetNSGone) {
		p.note(r, fmt.Sprintf("network %s could not be checked or repaired in full: %v", conf.Name, err))
		return nil
	}
	if err != nil {
		return r.networkError("check network "+conf.Name, err)
	}
	return nil
}

// collectNetwork removes what is left of attachments that are not valid.
func (p *Plugin) collectNetwork(cmd *skel.CmdArgs, conf *netConf, valid []workload.AttachmentID) error {
	net, err := p.network(conf)
	if err != nil {
		return err
	}
	removed, err := net.Collect(valid, cmd.Path)
	for _, key := range removed {
		p.note(caller{containerID: key.ContainerID}, "collected: its network, which is no longer valid in "+conf.Name)
	}
	if err != nil {
		return types.NewError(CodeNetwork, fmt.Sprintf("network %s: collect attachments: %v", conf.Name, err), "")
	}
	return nil
}

// ownNetwork is the network of an attachment that may be there already, and
// whether it is one that the plugin built: a runtime hands a previous result to
// DEL and CHECK in both cases. A conflist that ADD would refuse by now does not
// keep DEL from its work: the record holds what was built.
func (p *Plugin) ownNetwork(cmd *skel.CmdArgs, conf *netConf) (net Network, own bool) {
	net, err := p.network(conf)
	if err != nil {
		net = p.Network(attachment.Config{Name: conf.Name, CNIVersion: conf.CNIVersion}, conf.stateDir(p.Paths))
		return net, net.Owns(keyOf(cmd))
	}
	return net, conf.wantsInterface() || conf.names(attachment.HostDevice(keyOf(cmd))) || net.Owns(keyOf(cmd))
}

func (p *Plugin) network(conf *netConf) (Network, error) {
	stateDir := conf.stateDir(p.Paths)
	config, err := conf.network(stateDir)
	if err != nil {
		return nil, err
	}
	return p.Network(config, stateDir), nil
}

func attachmentOf(cmd *skel.CmdArgs) attachment.Attachment {
	return attachment.Attachment{Key: keyOf(cmd), NetNS: cmd.Netns, Args: cmd.Args, Path: cmd.Path}
}

// probeNetwork reports what an ADD would not find.
func (p *Plugin) probeNetwork(cmd *skel.CmdArgs, conf *netConf) error {
	net, err := p.network(conf)
	if err != nil {
		return err
	}
	if err := net.Probe(cmd.Path); err != nil {
		return types.NewError(types.ErrPluginNotAvailable, fmt.Sprintf("probe network %s: %v", conf.Name, err), remedyFor(err))
	}
	return nil
}
