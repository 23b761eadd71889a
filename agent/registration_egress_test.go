// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"net/netip"
	"testing"

	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect/workload"
)

// Meta of the registration strengthens each guard by itself, and nonsense is told.
func TestEgressOfARegistration(t *testing.T) {
	for value, want := range map[string]workload.Guard{"enforce": workload.GuardEnforce, "audit": workload.GuardAudit, "off": workload.GuardOff, "On": ""} {
		p := registration.Registration{Kind: registration.KindSidecar, Port: 1, Meta: map[string]string{registration.EgressMeta: value}}.Parse(netip.MustParseAddr("127.0.0.1"))
		if p.Egress != want || p.Guard != "" || (want == "") != (len(p.Problems) > 0) {
			t.Errorf("%s = %q gives %q and guard %q, told %q; want %q", registration.EgressMeta, value, p.Egress, p.Guard, p.Problems, want)
		}
	}
}
