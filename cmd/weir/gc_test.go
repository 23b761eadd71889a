// SPDX-License-Identifier: MPL-2.0

package main

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/cni/ended"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
)

const (
	goneID  = "0b5d0c1e-7c0f-4d0e-9a51-2f6c8e1d0a01"
	emptyID = "6e1d0a01-7c0f-4d0e-9a51-2f6c8e1d0b02"
)

func leftBehind() *node {
	return &node{left: []ended.Attachment{
		{Key: workload.AttachmentID{ContainerID: goneID, IfName: "eth0"}, Job: workload.Job{ID: "demo", Group: "web"}, Network: "weir",
			NetNS: "/var/run/docker/netns/1", State: ended.Gone},
		{Key: workload.AttachmentID{ContainerID: emptyID, IfName: "eth0"}, Job: workload.Job{ID: "demo", Group: "db"}, Network: "nomad",
			NetNS: "/var/run/netns/" + emptyID, State: ended.Empty},
	}}
}

const keptLine = "kept demo/db/6e1d0a01 from network nomad: nothing runs in /var/run/netns/" + emptyID +
	"; where 'nomad alloc status 6e1d0a01' says that it ended: weir gc -empty 6e1d0a01\n"

func TestGC(t *testing.T) {
	both := []string{goneID, emptyID}
	for _, each := range []struct {
		name    string
		args    []string
		removed []string
		outcome outcome
	}{
		{"what is over for sure", nil, both[:1], outcome{
			stdout: "removed demo/web/0b5d0c1e from network weir: no namespace of it is left\n" + keptLine}},
		{"dry run", []string{"-dry-run"}, nil, outcome{
			stdout: "would remove demo/web/0b5d0c1e from network weir: no namespace of it is left\n" + keptLine}},
		{"the operator's word", []string{"-empty", "6e1d0a01"}, both, outcome{
			stdout: "removed demo/web/0b5d0c1e from network weir: no namespace of it is left\n" +
				"removed demo/db/6e1d0a01 from network nomad: nothing runs in /var/run/netns/" + emptyID + "\n"}},
		{"the operator's word, dry", []string{"-empty", emptyID, "-dry-run"}, nil, outcome{
			stdout: "would remove demo/web/0b5d0c1e from network weir: no namespace of it is left\n" +
				"would remove demo/db/6e1d0a01 from network nomad: nothing runs in /var/run/netns/" + emptyID + "\n"}},
		{"all", []string{"-empty", "all"}, both, outcome{
			stdout: "removed demo/web/0b5d0c1e from network weir: no namespace of it is left\n" +
				"removed demo/db/6e1d0a01 from network nomad: nothing runs in /var/run/netns/" + emptyID + "\n"}},
		{"another", []string{"-empty", "77777777"}, both[:1], outcome{code: 1,
			stdout: "removed demo/web/0b5d0c1e from network weir: no namespace of it is left\n" + keptLine,
			stderr: "weir gc: -empty 77777777: nothing is left of such an allocation, or something runs there\n"}},
		{"too short", []string{"-empty", "6e1"}, nil, outcome{code: 1,
			stderr: "weir gc: -empty 6e1: want at least 8 characters of an allocation's ID\n"}},
		{"nothing to name", []string{"-empty", "6e1d0a01,"}, nil, outcome{code: 1,
			stderr: "weir gc: -empty : want at least 8 characters of an allocation's ID\n"}},
	} {
		t.Run(each.name, func(t *testing.T) {
			n := leftBehind()
			want(t, try(t, n, nil, append([]string{"gc"}, each.args...)...), each.outcome)
			var removed []string
			for _, key := range n.collected {
				removed = append(removed, key.ContainerID)
			}
			if diff := cmp.Diff(each.removed, removed); diff != "" {
				t.Errorf("removed (-want +got):\n%s", diff)
			}
		})
	}
}

func TestGCOnACleanNode(t *testing.T) {
	n := &node{}
	want(t, try(t, n, map[string]string{"WEIR_STATE_DIR": "/elsewhere"}, "gc", "-netns-dir", "/netns", "-cni-path", "/a:/b"),
		outcome{stdout: "nothing to do: no allocation that is over has left anything\n"})
	wanted := ended.Node{Paths: store.Paths{StateDir: "/elsewhere"}, CacheDir: ended.DefaultCacheDir, NetNSDir: "/netns", CNIPath: "/a:/b"}
	if diff := cmp.Diff(wanted, n.lookedAt); diff != "" {
		t.Errorf("looked at (-want +got):\n%s", diff)
	}
}

// One that cannot be removed does not keep the others from it.
func TestGCGoesOn(t *testing.T) {
	n := leftBehind()
	n.stuck = map[workload.AttachmentID]error{n.left[0].Key: ended.ErrInUse}
	want(t, try(t, n, nil, "gc", "-empty", "all"), outcome{code: 1,
		stdout: "removed demo/db/6e1d0a01 from network nomad: nothing runs in /var/run/netns/" + emptyID + "\n",
		stderr: "weir gc: remove network of demo/web/0b5d0c1e: it is in use\n"})
	if len(n.collected) != 1 {
		t.Errorf("removed %v, want one", n.collected)
	}
}

// What cannot be read is told, beside what is removed.
func TestGCTellsWhatItCannotRead(t *testing.T) {
	n := leftBehind()
	n.err = errors.New("list CNI results: no")
	got := try(t, n, nil, "gc", "-json")
	if got.code != 1 || got.stderr != "weir gc: list CNI results: no\n" || len(n.collected) != 1 {
		t.Errorf("gc = %+v, removed %v; want the error and one removed", got, n.collected)
	}
}

func TestGCJSON(t *testing.T) {
	want(t, try(t, leftBehind(), nil, "gc", "-dry-run", "-json"), outcome{stdout: `{
  "schema": 1,
  "dry_run": true,
  "removed": [
    {
      "key": {
        "container_id": "` + goneID + `",
        "if_name": "eth0"
      },
      "job": {
        "id": "demo",
        "group": "web"
      },
      "network": "weir",
      "netns": "/var/run/docker/netns/1",
      "state": "gone"
    }
  ],
  "kept": [
    {
      "key": {
        "container_id": "` + emptyID + `",
        "if_name": "eth0"
      },
      "job": {
        "id": "demo",
        "group": "db"
      },
      "network": "nomad",
      "netns": "/var/run/netns/` + emptyID + `",
      "state": "empty"
    }
  ]
}
`})
}
