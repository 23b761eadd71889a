// SPDX-License-Identifier: MPL-2.0

package main

import (
	"testing"

	"github.com/weirmesh/weir/redirect"
)

func TestWorkloads(t *testing.T) {
	n := &node{list: []redirect.WorkloadStatus{
		{
			Key: redirect.Key{ContainerID: "0b5d0c1e-7c0f-4d0e-9a51-2f6c8e1d0a01", IfName: "eth0"},
			ID:  "0b5d0c1e-7c0f-4d0e-9a51-2f6c8e1d0a01", Job: "demo", Group: "web", Mode: redirect.ModeTransparent,
			Proxy:    redirect.ProxyStatus{UID: 101, Identity: redirect.IdentityCgroup, Inbound: 20000, Outbound: 15001, Listeners: 4},
			Sidecars: []redirect.ProxyStatus{{Service: "api", UID: 101, Identity: redirect.IdentityCgroup, Inbound: 20001, Listeners: 1}},
			Origins:  12, Budget: 65536,
		},
		{
			Key: redirect.Key{ContainerID: "1c6e1d2f", IfName: "eth0"}, ID: "1c6e1d2f", Mode: redirect.ModeTransparent,
			Proxy: redirect.ProxyStatus{UID: 101, Identity: redirect.IdentityUID, Outbound: 15001}, Budget: 65536,
			Notes:    []string{"port \"0\" in ExcludeInboundPorts means nothing"},
			Problems: []redirect.Problem{{What: "its namespace is gone", Remedy: "run CNI DEL or GC"}},
		},
	}}
	want(t, try(t, n, nil, "workloads"), outcome{stdout: `ID        JOB   GROUP  MODE         PROXY UID  IDENTITY  INBOUND  OUTBOUND  LISTENERS  ORIGINS
0b5d0c1e  demo  web    transparent  101        cgroup    20000    15001     4          12 of 65536
                + api               101        cgroup    20001    -         1
1c6e1d2f  -     -      transparent  101        uid       -        15001     0          0 of 65536

1c6e1d2f
  its namespace is gone
    remedy: run CNI DEL or GC
  note: port "0" in ExcludeInboundPorts means nothing
`})
}

func TestNoWorkloads(t *testing.T) {
	want(t, try(t, &node{}, nil, "workloads"), outcome{stdout: "no workloads\n"})
	want(t, try(t, &node{}, nil, "workloads", "-json"), outcome{stdout: "[]\n"})
}
