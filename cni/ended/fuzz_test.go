// SPDX-License-Identifier: MPL-2.0

package ended

import (
	"strings"
	"testing"
)

// FuzzPorts holds the host ports that libcni's cache remembers of an allocation: they
// are refused by the field's name, or each is a port, with a protocol in lower case and
// no address or one as the rules have it.
func FuzzPorts(f *testing.F) {
	for _, seed := range []string{
		"", "null", "[]", "{}", `[{"hostPort":8080,"containerPort":80,"protocol":"TCP","hostIP":"192.0.2.1"}]`, `[{"hostPort":0}]`, `[{"hostPort":65536}]`,
		`[{"hostPort":1,"hostIP":"::ffff:1.2.3.4"},{"hostPort":1,"hostIP":"::"},{"hostPort":1,"hostIP":"x"}]`, `[null,{"hostPort":-1}]`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		list, err := parsePorts(text)
		if err != nil {
			if list != nil || !strings.Contains(err.Error(), "port mappings") {
				t.Errorf("%q: %v, %v", text, list, err)
			}
			return
		}
		for _, p := range list {
			if p.port == 0 || p.protocol == "" || p.protocol != strings.ToLower(p.protocol) || p.addr.IsValid() && (p.addr.Is4In6() || p.addr.IsUnspecified()) {
				t.Errorf("%q: port %+v", text, p)
			}
		}
	})
}
