// SPDX-License-Identifier: MPL-2.0

package request

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParsePorts(t *testing.T) {
	for text, want := range map[string][]uint16{
		"":                       nil,
		"1 65535":                {1, 65535},
		"8002:8004 8003 80 8004": {80, 8002, 8003, 8004},
		"65534: :2":              {1, 2, 65534, 65535},
		"7:7":                    {7},
	} {
		got, err := parsePorts(strings.Fields(text))
		if err != nil {
			t.Errorf("%q: %v", text, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%q (-want +got):\n%s", text, diff)
		}
	}
}

func TestParseCIDR(t *testing.T) {
	for text, want := range map[string]string{
		"10.0.0.0/8": "10.0.0.0/8", "10.1.2.3/8": "10.0.0.0/8", "192.0.2.7": "192.0.2.7/32", "0.0.0.0/0": "0.0.0.0/0",
		"fd99::/64": "fd99::/64", "fd99::1": "fd99::1/128", "::/0": "::/0",
		"::ffff:10.0.0.1": "10.0.0.1/32", "::ffff:10.9.0.0/104": "10.0.0.0/8",
	} {
		got, err := parseCIDR(text)
		if err != nil || got.String() != want {
			t.Errorf("%s: %v, %v: want %s", text, got, err, want)
		}
	}
}
