// SPDX-License-Identifier: MPL-2.0

package request

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/redirect/workload"
)

func TestParseArgs(t *testing.T) {
	type parsed struct {
		Job  workload.Job
		Args Args
	}
	for text, want := range map[string]parsed{
		"":                       {},
		";;=;x;=y":               {},
		"IgnoreUnknown=true;A=b": {},
		"NOMAD_REGION=eu;NOMAD_NAMESPACE=ns;NOMAD_JOB_ID=j=1;NOMAD_GROUP_NAME=g h;NOMAD_ALLOC_ID=a": {
			Job: workload.Job{Region: "eu", Namespace: "ns", ID: "j=1", Group: "g h", AllocID: "a"},
		},
		"CONSUL_IPTABLES_CONFIG={\"a\":\"b=c\"};CONSUL_NFTABLES_CONFIG=": {
			Args: Args{Mesh: []Arg{{iptablesArg, `{"a":"b=c"}`}, {nftablesArg, ""}}},
		},
		"weir.mode=x;weir.=;weird=y": {Args: Args{Own: []Arg{{"weir.", ""}, {"weir.mode", "x"}}}},
		// Names are as exact as Nomad's; CNI gives blanks no meaning.
		" NOMAD_JOB_ID=j;nomad_job_id=j": {},
	} {
		job, args := ParseArgs(text)
		if diff := cmp.Diff(want, parsed{job, args}); diff != "" {
			t.Errorf("%q (-want +got):\n%s", text, diff)
		}
	}
}

// FuzzParseArgs holds the parser to what it promises: nothing is invented, and
// the order of the pairs, which Nomad takes from a map, does not matter.
func FuzzParseArgs(f *testing.F) {
	for _, seed := range []string{"", ";", "=", "a=b;c", "NOMAD_JOB_ID=j=1;x", "CONSUL_IPTABLES_CONFIG={};weir.mode=y", "CONSUL_NFTABLES_CONFIG==;"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		job, args := ParseArgs(text)
		for _, pair := range args.Mesh {
			if !strings.Contains(";"+text+";", ";"+pair.Key+"="+pair.Value+";") {
				t.Errorf("%q: pair %q=%q is not in it", text, pair.Key, pair.Value)
			}
		}
		parts := strings.Split(text, ";")
		keys := make(map[string]bool)
		for _, part := range parts {
			key, _, _ := strings.Cut(part, "=")
			if keys[key] {
				return // of two equal keys the order does matter
			}
			keys[key] = true
		}
		slices.Reverse(parts)
		sameJob, reversed := ParseArgs(strings.Join(parts, ";"))
		slices.Reverse(reversed.Mesh)
		if diff := cmp.Diff(args, reversed); diff != "" || job != sameJob {
			t.Errorf("%q: reversed (-want +got):\n%s", text, diff)
		}
	})
}
