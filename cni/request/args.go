// SPDX-License-Identifier: MPL-2.0

package request

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

// Arg is one argument: a key and its value.
type Arg struct{ Key, Value string }

// Args are the arguments of a call that are Weir's to read. All of it is untrusted:
// a job's author can write each of them.
type Args struct {
	Mesh []Arg // under one of Consul's two names, in order of appearance
	Own  []Arg // keys that begin with weir., sorted
}

// ParseArgs reads CNI_ARGS as Nomad writes it. It is lenient where CNI's own
// parser is not: the first '=' ends the key and a value may hold more of them,
// a part without any is skipped, and so is every unknown key.
func ParseArgs(text string) (workload.Job, Args) {
	var pairs [][2]string
	for part := range strings.SplitSeq(text, ";") {
		if key, value, ok := strings.Cut(part, "="); ok {
			pairs = append(pairs, [2]string{key, value})
		}
	}
	return SortArgs(pairs)
}

// SortArgs tells the arguments apart, as ParseArgs does, where they come in pairs:
// libcni remembers them so.
func SortArgs(pairs [][2]string) (job workload.Job, args Args) {
	for _, pair := range pairs {
		switch key, value := pair[0], pair[1]; {
		case job.SetArg(key, value):
		case key == iptablesArg, key == nftablesArg:
			args.Mesh = append(args.Mesh, Arg{key, value})
		case strings.HasPrefix(key, ownPrefix):
			args.Own = append(args.Own, Arg{key, value})
		}
	}
	slices.SortFunc(args.Own, func(a, b Arg) int {
		return cmp.Or(strings.Compare(a.Key, b.Key), strings.Compare(a.Value, b.Value))
	})
	return job, args
}

// None reports arguments that ask for nothing.
func (a Args) None() bool { return len(a.Mesh)+len(a.Own) == 0 }
