// SPDX-License-Identifier: MPL-2.0

package cni

import (
	"errors"
	"fmt"
	"strings"
	"syscall"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/utils"
	"github.com/weirmesh/weir/cni/network/attachment"
	"github.com/weirmesh/weir/cni/request"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/probe"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
)

// Codes of the plugin's own errors, in the range that CNI leaves to plugins.
// All other codes are CNI's.
const (
	// CodeConsulRules: Consul's own iptables or nftables rules are in the
	// namespace. Remedy: stop the allocation, so that it gets a new one; have
	// one of the two plugins in a conflist.
	CodeConsulRules uint = 100
	// CodeUnsupported: the host lacks what the data path needs. Remedy: Linux
	// 6.1 or newer, with the root of cgroup v2 mounted.
	CodeUnsupported uint = 101
	// CodeIncompatible: the programs loaded on the node are of a version
	// whose maps differ. Remedy: load with the version that the node should run.
	CodeIncompatible uint = 102
	// CodeDatapath: a step in the kernel or in the state directory went wrong.
	CodeDatapath uint = 103
	// CodeNetwork: a step of building the network went wrong.
	CodeNetwork uint = 104
	// CodeForward: the node drops what it forwards, and the plugin cannot
	// change that. Remedy: let the bridge through.
	CodeForward uint = 105
	// CodeMissing: a program that the network needs is not on the node.
	// Remedy: install it.
	CodeMissing uint = 106
	// CodeOtherInstance: another instance of Weir, whose pins are elsewhere,
	// serves the namespace. Remedy: one set of paths for the plugin and the agent.
	CodeOtherInstance uint = 107
)

// caller is who asked, for texts.
type caller struct {
	job         workload.Job
	containerID string
}

// String names the allocation. Where the arguments hold no allocation ID, or
// one that could not be an ID, the container ID does.
func (r caller) String() string {
	if utils.ValidateContainerID(r.job.AllocID) == nil {
		return "allocation " + r.job.AllocID
	}
	return "allocation " + r.containerID
}

// argError is an error of CNI that names the allocation. All of it is on one line, as
// Nomad shows it.
func (r caller) argError(code uint, text string) error {
	return r.error(code, text, "")
}

// requestError is the error of a request that is refused.
func (r caller) requestError(err error) error {
	code := types.ErrInvalidEnvironmentVariables
	var refused *request.Error
	if errors.As(err, &refused) {
		switch refused.Fault {
		case request.NotJSON:
			code = types.ErrDecodingFailure
		case request.WrongNetwork:
			code = types.ErrInvalidNetworkConfig
		}
	}
	return r.argError(code, err.Error())
}

// stepError is fail for a step and its cause, with the remedy as details.
func (r caller) stepError(step string, cause error) error {
	return r.error(codeOf(cause), fmt.Sprintf("%s: %v", step, cause), remedyFor(cause))
}

func (r caller) error(code uint, text, remedy string) error {
	return types.NewError(code, fmt.Sprintf("%s: %s", r, strings.ReplaceAll(text, "\n", "; ")), remedy)
}

// networkError is failed for a step of building the network.
func (r caller) networkError(step string, cause error) error {
	code := codeOf(cause)
	if code == CodeDatapath {
		code = CodeNetwork
	}
	return r.error(code, fmt.Sprintf("%s: %v", step, cause), remedyFor(cause))
}

func codeOf(err error) uint {
	switch {
	case errors.Is(err, host.ErrConsulRules):
		return CodeConsulRules
	case errors.Is(err, probe.ErrUnsupported):
		return CodeUnsupported
	case errors.Is(err, bpfmap.ErrIncompatible):
		return CodeIncompatible
	case errors.Is(err, program.ErrOtherInstance):
		return CodeOtherInstance
	case errors.Is(err, attachment.ErrForward):
		return CodeForward
	case errors.Is(err, attachment.ErrMissing):
		return CodeMissing
	case errors.Is(err, host.ErrHostNetNS), errors.Is(err, host.ErrNetNSGone):
		return types.ErrInvalidNetNS
	case errors.Is(err, store.ErrUnknown):
		return types.ErrUnknownContainer
	case errors.Is(err, syscall.EAGAIN), errors.Is(err, syscall.EBUSY), errors.Is(err, attachment.ErrInUse):
		return types.ErrTryAgainLater
	default:
		return CodeDatapath
	}
}

func remedyFor(err error) string {
	switch {
	case errors.Is(err, host.ErrConsulRules):
		return "stop the allocation: a new one gets a clean namespace, but where Consul's own plugin is in the same conflist: take one of the two out"
	case errors.Is(err, probe.ErrUnsupported):
		return "Linux 6.1 or newer is needed, with the root of cgroup v2 mounted; `weir status` names what is missing"
	case errors.Is(err, program.ErrOtherInstance):
		return "end the allocation with the pin_dir and state_dir that it was started with, or unload the other instance of Weir"
	case errors.Is(err, bpfmap.ErrIncompatible):
		return "run `weir load`, or restart the agent, with the version of the plugin: running workloads come along"
	case errors.Is(err, host.ErrHostNetNS):
		return "use network mode bridge or cni/*: the host's own namespace is never redirected"
	case errors.Is(err, host.ErrNetNSGone):
		return "the namespace ended while the plugin ran; Nomad makes a new one"
	case errors.Is(err, attachment.ErrForward):
		return "let the bridge through with the program that owns the chain, as by `iptables-legacy -I FORWARD -i <bridge> -j ACCEPT` and the same with -o, or `firewall-cmd --zone=trusted --add-interface=<bridge>`"
	case errors.Is(err, attachment.ErrMissing):
		return "install what is named; the reference CNI plugins belong into Nomad's cni_path"
	case errors.Is(err, syscall.EAGAIN):
		return "try again; a process that keeps the lock must end, since nothing on the node can change meanwhile"
	case errors.Is(err, workload.ErrFull):
		return "the node holds no more: fewer allocations, or fewer exclusions in their jobs"
	case errors.Is(err, attachment.ErrInUse):
		return "stop the allocation, where Nomad has not: its tasks stay in the old namespace, another allocation's start in a new one"
	case errors.Is(err, attachment.ErrTaken):
		return "name another bridge in the conflist, or remove what has the name or the address"
	default:
		return "`weir status` shows the state of the node"
	}
}
