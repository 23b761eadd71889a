// SPDX-License-Identifier: MPL-2.0

// Package request reads what Nomad, Consul, a job's author and the operator hand to
// the plugin: the arguments of a call, Consul's config and the job's own keys in them,
// and the policy that says which of those count. The plugin reads a request with it,
// and so does the agent where a record is lost. It touches nothing on the node but
// the operator's files.
package request

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/weirmesh/weir/redirect/workload"
)

// Network is what a network's configuration says of the requests for it. The keys of
// its policy stay undecoded until a request needs them: a DEL never fails for them.
type Network struct {
	Name string `json:"name"`

	JobArgs          json.RawMessage `json:"jobArgs"`
	ConsulExclusions json.RawMessage `json:"consulExclusions"`
	ConfigDir        json.RawMessage `json:"configDir"`
	Forward          json.RawMessage `json:"forward"`
}

// PluginNames are the names under which the plugin is installed; the second may be
// Consul's own where both are in a list.
func PluginNames() []string { return []string{"weir", "consul-cni"} }

// ErrNoPlugin is a network configuration that names no plugin of ours: whatever the
// arguments of a call say, nobody of ours was asked.
var ErrNoPlugin = errors.New("the network configuration names no plugin of Weir's")

// NetworkOf finds the plugin's part in a configuration as libcni keeps it: that of
// one plugin or a list of them. It is ErrNoPlugin where none of them is ours.
func NetworkOf(config []byte) (Network, error) {
	var list struct {
		Name    string            `json:"name"`
		Plugins []json.RawMessage `json:"plugins"`
	}
	if err := json.Unmarshal(config, &list); err != nil {
		return Network{}, fmt.Errorf("read network configuration: %w", err)
	}
	if list.Plugins == nil {
		list.Plugins = []json.RawMessage{config}
	}
	found := make(map[string]Network)
	for _, text := range list.Plugins {
		var plugin struct {
			Type string `json:"type"`
			Network
		}
		if err := json.Unmarshal(text, &plugin); err != nil {
			return Network{}, fmt.Errorf("read network configuration: %w", err)
		}
		plugin.Name = list.Name // libcni gives it to each
		if _, twice := found[plugin.Type]; !twice {
			found[plugin.Type] = plugin.Network
		}
	}
	for _, name := range PluginNames() {
		if network, ok := found[name]; ok {
			return network, nil
		}
	}
	return Network{}, ErrNoPlugin
}

// forwards reports whether the network lets packets be forwarded through the
// namespaces of its allocations.
func (n Network) forwards() (bool, error) {
	if Empty(n.Forward) {
		return false, nil
	}
	allowed, err := decode[bool](n.Forward, "true or false")
	if err != nil {
		return false, fmt.Errorf("forward: %w", err)
	}
	return allowed, nil
}

// Read gives the workload that a call asks for: by Consul's config, by the job's own
// arguments, or by both, where the second add to the first; nil where it asks for
// nothing. It has no addresses yet. dir is where the operator's policy lies, as the
// environment says; where that is empty, the network says so, or it is DefaultConfigDir.
// An error is an *Error, which names the field or the key.
func Read(job workload.Job, args Args, network Network, dir string) (*workload.Request, error) {
	if args.None() {
		return nil, nil
	}
	mesh, err := args.mesh()
	if err != nil {
		return nil, err
	}
	asked := jobRequest{Request: workload.Request{Network: network.Name, Job: job}, consul: mesh != nil}
	if mesh != nil {
		if err := mesh.decode(&asked.Request); err != nil {
			return nil, refuse(WrongArguments, err)
		}
	}
	if len(args.Own) > 0 || asked.excludesOutbound() {
		operator, err := readPolicy(network, dir)
		if err != nil {
			return nil, refuse(WrongNetwork, fmt.Errorf("read the operator's policy: %w", err))
		}
		if err := asked.withJobArgs(args.Own, mesh, operator); err != nil {
			return nil, refuse(WrongArguments, err)
		}
	}
	forwards, err := network.forwards()
	if err != nil {
		return nil, refuse(WrongNetwork, err)
	}
	asked.Forward = asked.Forward || forwards
	request := asked.finish(mesh)
	return &request, nil
}

// Fault says what about a request is wrong.
type Fault int

const (
	WrongArguments Fault = iota // a value in them, or one that the policy refuses
	NotJSON                     // Consul's config cannot be decoded
	WrongNetwork                // the network's configuration or the operator's policy
)

// Error is a request that is refused.
type Error struct {
	Fault Fault
	cause error
}

func refuse(fault Fault, cause error) error { return &Error{Fault: fault, cause: cause} }

func (e *Error) Error() string { return e.cause.Error() }

func (e *Error) Unwrap() error { return e.cause }
