// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"testing"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/reconcile"
)

// Who is the proxy is decided from what was observed alone.
func TestExistingListenerIsTheProxysOrWaits(t *testing.T) {
	const (
		outbound4, inbound4 = bpfmap.BpfListenerRoleLISTENER_OUTBOUND4, bpfmap.BpfListenerRoleLISTENER_INBOUND4
		pinned, listens4    = bpfmap.BpfProxyFlagPROXY_PINNED, bpfmap.BpfProxyFlagPROXY_LISTENS4
	)
	for name, c := range map[string]struct {
		proxy    bpfmap.BpfProxy
		role     bpfmap.BpfListenerRole
		cgroup   uint64
		rejected []uint64
		want     bpfmap.BpfProxy
		admitted bool
	}{
		"the first shows who the proxy is": {role: outbound4, cgroup: 7,
			want: bpfmap.BpfProxy{Cgroup: 7, Flags: pinned | listens4}, admitted: true},
		"a second of the same proxy": {proxy: bpfmap.BpfProxy{Cgroup: 7, Listeners: 1, Flags: listens4}, role: inbound4, cgroup: 7,
			want: bpfmap.BpfProxy{Cgroup: 7, Listeners: 1, Flags: listens4}, admitted: true},
		"a second candidate": {proxy: bpfmap.BpfProxy{Cgroup: 7, Listeners: 1}, role: outbound4, cgroup: 8,
			want: bpfmap.BpfProxy{Cgroup: 7, Listeners: 1}},
		"a task that was taken for the proxy before": {role: outbound4, cgroup: 8, rejected: []uint64{8}},
		"a process outside of the hierarchy, beside a known proxy": {proxy: bpfmap.BpfProxy{Cgroup: 7}, role: outbound4,
			want: bpfmap.BpfProxy{Cgroup: 7, Flags: listens4}, admitted: true},
	} {
		t.Run(name, func(t *testing.T) {
			l := reconcile.ExistingListener{Roles: []bpfmap.BpfListenerRole{c.role}, Missing: []bpfmap.BpfListenerRole{c.role}}
			if got, admitted := l.Decide(c.proxy, c.cgroup, c.rejected); got != c.want || admitted != c.admitted {
				t.Errorf("decided %+v, %t; want %+v, %t", got, admitted, c.want, c.admitted)
			}
		})
	}
}
