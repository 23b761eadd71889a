// SPDX-License-Identifier: MPL-2.0

package cni

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/redirect/workload"
)

func TestParseArgs(t *testing.T) {
	for text, want := range map[string]arguments{
		"":                       {},
		";;=;x;=y":               {},
		"IgnoreUnknown=true;A=b": {},
		"NOMAD_REGION=eu;NOMAD_NAMESPACE=ns;NOMAD_JOB_ID=j=1;NOMAD_GROUP_NAME=g h;NOMAD_ALLOC_ID=a": {
			job: workload.Job{Region: "eu", Namespace: "ns", ID: "j=1", Group: "g h", AllocID: "a"},
		},
		"CONSUL_IPTABLES_CONFIG={\"a\":\"b=c\"};CONSUL_NFTABLES_CONFIG=": {
			mesh: []argument{{iptablesArg, `{"a":"b=c"}`}, {nftablesArg, ""}},
		},
		"weir.mode=x;weir.=;weird=y": {own: []argument{{"weir.", ""}, {"weir.mode", "x"}}},
		// Names are as exact as Nomad's; CNI gives blanks no meaning.
		" NOMAD_JOB_ID=j;nomad_job_id=j": {},
	} {
		if diff := cmp.Diff(want, parseArgs(text), cmp.AllowUnexported(arguments{}, argument{})); diff != "" {
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
		args := parseArgs(text)
		for _, pair := range args.mesh {
			if !strings.Contains(";"+text+";", ";"+pair.key+"="+pair.value+";") {
				t.Errorf("%q: pair %q=%q is not in it", text, pair.key, pair.value)
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
		reversed := parseArgs(strings.Join(parts, ";"))
		slices.Reverse(reversed.mesh)
		if diff := cmp.Diff(args, reversed, cmp.AllowUnexported(arguments{}, argument{})); diff != "" {
			t.Errorf("%q: reversed (-want +got):\n%s", text, diff)
		}
	})
}
