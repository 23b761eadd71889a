// SPDX-License-Identifier: MPL-2.0

package gate

import (
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/agent/registration"
)

// A job makes the wait shorter, never longer, and ends it with nought.
func TestTimeout(t *testing.T) {
	second, zero, long := time.Second, time.Duration(0), time.Minute
	for _, c := range []struct {
		proxies []registration.Proxy
		want    time.Duration
	}{
		{nil, 30 * time.Second}, {[]registration.Proxy{{Gate: &long}}, 30 * time.Second},
		{[]registration.Proxy{{}, {Gate: &second}}, time.Second},
		{[]registration.Proxy{{Gate: &zero}, {Gate: &second}}, 0},
	} {
		if got := Timeout(configfile.DefaultConfig().Gate.Duration(), c.proxies); got != c.want {
			t.Errorf("timeout = %s, want %s", got, c.want)
		}
	}
}
