// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"testing"
	"time"

	"github.com/weirmesh/weir/test/nomad/wire"
)

// Only Envoy's own answer, for a service that was seen to fail at the time, is Consul's doing.
func TestHealthExplains(t *testing.T) {
	at := func(second int) time.Time { return time.Unix(1000+int64(second), 0) }
	h := &Health{failing: make(map[string][]span)}
	for second := 10; second < 20; second++ {
		h.saw("web-sidecar-proxy", at(second), at(second).Add(time.Millisecond*100))
	}
	h.saw("web-sidecar-proxy", at(40), at(41))
	lost := func(second int) wire.Outcome {
		return wire.Outcome{At: at(second), Status: 503, Text: "no healthy upstream"}
	}
	reset, refused := lost(15), lost(15)
	reset.Text, refused.Status = "upstream connect error", 0
	for _, c := range []struct {
		name    string
		service string
		lost    wire.Outcome
		want    bool
	}{
		{"while it failed", "web", lost(15), true},
		{"once more", "web", lost(40), true},
		{"long before", "web", lost(5), false},
		{"between", "web", lost(30), false},
		{"another service", "api", lost(15), false},
		{"another answer of Envoy's", "web", reset, false},
		{"no answer", "web", refused, false},
	} {
		if got := h.Explains(c.service, c.lost); got != c.want {
			t.Errorf("%s: explained %t, want %t", c.name, got, c.want)
		}
	}
	if spans := len(h.failing["web-sidecar-proxy"]); spans != 2 {
		t.Errorf("%d spans, want 2", spans)
	}
}
