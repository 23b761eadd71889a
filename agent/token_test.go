// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"path/filepath"
	"testing"
	"time"

	realconsul "github.com/weirmesh/weir/test/consul"
)

// leastPolicy is what docs/install.md says that the agent of the node needs.
const leastPolicy = `
	node "node" { policy = "read" }
	agent "node" { policy = "read" }
	service_prefix "" { policy = "read" }`

// A token that Consul revokes is told within five seconds, and another one in the
// file is used at once, whatever blocking query is open or however long Consul was
// not answering.
func TestTokenIsRevokedAndReplaced(t *testing.T) {
	server := realconsul.Start(t, true)
	server.Put("/v1/acl/policy", object{"Name": "weir", "Rules": leastPolicy})
	type token struct{ AccessorID, SecretID string }
	next := func() (made token) {
		server.Post("/v1/acl/token", object{"Policies": []object{{"Name": "weir"}}}, &made)
		return made
	}
	config := *DefaultConfig().Consul
	config.Address, config.TokenFile = server.Address, filepath.Join(t.TempDir(), "token")
	first := next()
	writeFile(t, config.TokenFile, first.SecretID)
	follower := runFollower(t, config, func(f *follower) { f.consul.read = defaultPatience().read })
	good := func(v view) bool { return v.InStep && !v.Hidden && v.Watch.What == "" && v.Bind.What == "" }
	follower.eventually(t, "the first token to be used", good)
	for range 3 { // each time the back-off is longer
		began := time.Now()
		server.Delete("/v1/acl/token/" + first.AccessorID)
		follower.eventually(t, "the revoked token to be told", func(v view) bool { return !v.InStep })
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("told after %s, want within 5 s", took)
		}
		first = next()
		began = time.Now()
		writeFile(t, config.TokenFile, first.SecretID)
		follower.eventually(t, "the new token to be used", good)
		if took := time.Since(began); took > 3*time.Second {
			t.Errorf("used after %s, want at once", took)
		}
	}
}
