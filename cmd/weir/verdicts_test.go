// SPDX-License-Identifier: MPL-2.0

package main

import (
	"strings"
	"testing"

	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
)

func twoWorkloads() *node {
	return &node{verdicts: []inspect.WorkloadVerdicts{
		{
			Key: workload.AttachmentID{ContainerID: "0b5d0c1e-7c0f-4d0e-9a51-2f6c8e1d0a01", IfName: "eth0"},
			Job: "demo", Group: "web", Cookie: 4711,
			Counts: map[string]uint64{"redirected": 12, "refused_no_proxy": 3, "proxy": 0},
		},
		{
			Key: workload.AttachmentID{ContainerID: "1c6e1d2f-8d1a-4e1f-8b62-3a7d9f2e1b02", IfName: "eth0"}, Cookie: 4712,
		},
	}}
}

func TestVerdicts(t *testing.T) {
	want(t, try(t, twoWorkloads(), nil, "verdicts"), outcome{stdout: `demo/web/0b5d0c1e
  VERDICT           COUNT  MEANING
  redirected        12     sent to the proxy's outbound listener
  refused_no_proxy  3      refused: the proxy has no outbound listener

1c6e1d2f
  no connection yet
`})
}

func TestAllVerdicts(t *testing.T) {
	got := try(t, twoWorkloads(), nil, "verdicts", "-all")
	for _, verdict := range bpfmap.AllVerdicts() {
		if count := strings.Count(got.stdout, "\n  "+verdict.String()+" "); count != 2 {
			t.Errorf("%s is listed %d times, want once per workload", verdict, count)
		}
		if meaning := strings.Join(strings.Fields(got.stdout), " "); !strings.Contains(meaning, verdict.Describe()) {
			t.Errorf("the meaning of %s is not whole, or is cut by another's", verdict)
		}
	}
	for line := range strings.Lines(got.stdout) {
		if text := strings.TrimRight(line, "\n"); len([]rune(text)) > base.Columns {
			t.Errorf("a line is longer than %d columns: %s", base.Columns, text)
		}
	}
}

func TestNoVerdicts(t *testing.T) {
	want(t, try(t, &node{}, nil, "verdicts"), outcome{stdout: "no workloads\n"})
	want(t, try(t, &node{}, nil, "verdicts", "-json"), outcome{stdout: "{\n  \"schema\": 1,\n  \"workloads\": []\n}\n"})
}
