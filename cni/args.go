// SPDX-License-Identifier: MPL-2.0

package cni

import (
	"cmp"
	"slices"
	"strings"

	"github.com/weirmesh/weir/redirect/workload"
)

// Names under which Nomad hands on the request of a transparent_proxy block.
// Both hold the same JSON.
const (
	iptablesArg = "CONSUL_IPTABLES_CONFIG"
	nftablesArg = "CONSUL_NFTABLES_CONFIG"
)

// ownPrefix begins the keys of network.cni.args that are meant for Weir.
const ownPrefix = "weir."

// argument is one pair of CNI_ARGS.
type argument struct{ key, value string }

// arguments is what CNI_ARGS says to the plugin.
type arguments struct {
	job  workload.Job
	mesh []argument // under one of Consul's two names, in order of appearance
	own  []argument // keys that begin with weir., sorted
}

// parseArgs reads CNI_ARGS as Nomad writes it. It is lenient where CNI's own
// parser is not: the first '=' ends the key and a value may hold more of them,
// a part without any is skipped, and so is every unknown key. What it keeps is
// untrusted.
func parseArgs(text string) arguments {
	var args arguments
	for part := range strings.SplitSeq(text, ";") {
		key, value, ok := strings.Cut(part, "=")
		if !ok {
			continue
		}
		switch {
		case args.job.SetArg(key, value):
		case key == iptablesArg, key == nftablesArg:
			args.mesh = append(args.mesh, argument{key, value})
		case strings.HasPrefix(key, ownPrefix):
			args.own = append(args.own, argument{key, value})
		}
	}
	slices.SortFunc(args.own, func(a, b argument) int {
		return cmp.Or(strings.Compare(a.key, b.key), strings.Compare(a.value, b.value))
	})
	return args
}

// none reports arguments that ask for nothing.
func (a arguments) none() bool { return len(a.mesh)+len(a.own) == 0 }
