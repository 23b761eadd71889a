// SPDX-License-Identifier: MPL-2.0

package main

import (
	"errors"
	"strings"
	"testing"

	"github.com/weirmesh/weir/redirect"
)

func healthy() redirect.Status {
	return redirect.Status{
		Loaded: true, Current: true, Workloads: 2,
		Paths:      redirect.Paths{PinDir: "/sys/fs/bpf/weir", StateDir: "/run/weir"},
		CgroupRoot: "/sys/fs/cgroup",
		Barrier:    redirect.BarrierKernel,
		Links:      []string{"weir_connect4", "weir_connect6"},
		Maps: []redirect.MapInfo{
			{Name: "origins", MaxEntries: 1048576, Bytes: 8392704},
			{Name: "workloads", MaxEntries: 16384, Bytes: 131329},
		},
	}
}

func TestStatus(t *testing.T) {
	want(t, try(t, &node{status: healthy()}, nil, "status"), outcome{stdout: `healthy: 2 workloads

pins         /sys/fs/bpf/weir
records      /run/weir
attached to  /sys/fs/cgroup
programs     connect4 connect6
changes      wait for running programs by membarrier

MAP        MOST ENTRIES  MEMORY
origins    1048576       8196 KiB
workloads  16384         129 KiB
`})
}

func TestStatusNotLoaded(t *testing.T) {
	status := redirect.Status{Problems: []redirect.Problem{
		{What: "the data path is not loaded: no workload is redirected", Remedy: "run 'weir load'"},
	}}
	want(t, try(t, &node{status: status}, nil, "status"), outcome{code: 1, stdout: `not healthy: 1 problem
  the data path is not loaded: no workload is redirected
    remedy: run 'weir load'
`})
}

func TestStatusWithProblems(t *testing.T) {
	status := healthy()
	status.Links, status.Maps = nil, nil
	status.Problems = []redirect.Problem{
		{What: "link connect4 is gone", Remedy: "run 'weir load'"},
		{What: "workload 0b5d0c1e-eth0: its namespace is gone", Remedy: "run CNI DEL or GC; nothing of it is in use"},
	}
	want(t, try(t, &node{status: status}, nil, "status"), outcome{code: 1, stdout: `not healthy: 2 problems
  link connect4 is gone
    remedy: run 'weir load'
  workload 0b5d0c1e-eth0: its namespace is gone
    remedy: run CNI DEL or GC; nothing of it is in use

pins         /sys/fs/bpf/weir
records      /run/weir
attached to  /sys/fs/cgroup
programs     -
changes      wait for running programs by membarrier
`})
}

func TestStatusJSON(t *testing.T) {
	status := redirect.Status{Links: []string{}, Maps: []redirect.MapInfo{}, Problems: []redirect.Problem{{What: "w", Remedy: "r"}}}
	want(t, try(t, &node{status: status}, nil, "status", "-json"), outcome{code: 1, stdout: `{
  "loaded": false,
  "current": false,
  "paths": {
    "pin_dir": "",
    "state_dir": "",
    "cgroup_root": ""
  },
  "cgroup_root": "",
  "links": [],
  "maps": [],
  "barrier": "",
  "workloads": 0,
  "problems": [
    "w; remedy: r"
  ]
}
`})
}

func TestStatusUnknown(t *testing.T) {
	want(t, try(t, &node{err: errors.New("take lock /run/weir/lock: permission denied")}, nil, "status"), outcome{
		code: 1, stderr: "weir status: take lock /run/weir/lock: permission denied\n",
	})
}

// Colour is for a terminal, and for those who did not say no.
func TestColour(t *testing.T) {
	for _, c := range []struct {
		terminal    bool
		environment map[string]string
		args        []string
		colour      bool
	}{
		{terminal: true, colour: true},
		{terminal: false},
		{terminal: true, environment: map[string]string{"NO_COLOR": "1"}},
		{terminal: true, environment: map[string]string{"TERM": "dumb"}},
		{terminal: true, args: []string{"-json"}},
	} {
		n := &node{status: healthy()}
		got := tryOn(t, n, c.terminal, c.environment, append([]string{"status"}, c.args...)...)
		if colour := strings.Contains(got.stdout, "\x1b["); colour != c.colour {
			t.Errorf("%+v: colour = %t", c, colour)
		}
	}
}
