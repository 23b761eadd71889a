// SPDX-License-Identifier: MPL-2.0

package catalog

import (
	"bytes"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/hashicorp/consul/api"
	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/agent/registration"
)

// oneAnswer gives one body to every question.
type oneAnswer []byte

func (b oneAnswer) RoundTrip(*http.Request) (*http.Response, error) {
	header := http.Header{"X-Consul-Index": {"7"}, "Content-Type": {"application/json"}}
	return &http.Response{StatusCode: http.StatusOK, Status: "200 OK", Header: header, Body: io.NopCloser(bytes.NewReader(b))}, nil
}

// FuzzConsulAnswers holds what Consul answers beside the registrations, in which other
// people's entries stand: an answer is refused as one of Consul's to that question, or
// what is made of it are addresses, ports and services that there can be.
func FuzzConsulAnswers(f *testing.F) {
	for _, seed := range []string{
		"", "null", "{}", "[]", "7", `{"Chain":{"AutoVirtualIPs":["240.0.0.1"],"ManualVirtualIPs":["::ffff:10.0.0.1","fe80::1%eth0","x",""]}}`, `{"Chain":null}`,
		`[{"Service":{"TaggedAddresses":{"consul-virtual":{"Address":"240.0.0.7","Port":80}}}},{"Service":null}]`,
		`[{"SourceName":"web","DestinationName":"api","Action":"allow"},{"SourceName":"*","DestinationName":"api","Action":"deny"},{"SourceName":"","Permissions":[{}]}]`,
		`{"Kind":"ingress-gateway","Listeners":[{"Port":8080},{"Port":70000},{"Port":-1},{"Port":8080}]}`,
		`{"a":{"ServiceID":"web","ExposedPort":21500},"b":{"ExposedPort":-1},"c":null}`, `[{"Service":{"CreateIndex":7}},{"Service":{"CreateIndex":5}},null]`, `{"Config":{"NodeName":"node","BindAddr":"::"}}`,
	} {
		f.Add([]byte(seed))
	}
	config := *configfile.DefaultConfig().Consul
	f.Fuzz(func(t *testing.T, body []byte) {
		c, err := NewClient(config, DefaultTimeouts())
		if err != nil {
			t.Fatal(err)
		}
		if c.Client, err = api.NewClient(&api.Config{Address: "consul", HttpClient: &http.Client{Transport: &boundedTransport{next: oneAnswer(body)}}}); err != nil {
			t.Fatal(err)
		}
		ctx := t.Context()
		refused := func(what string, err error) bool {
			if err != nil && !strings.Contains(err.Error(), what+" ") {
				t.Errorf("%q: the error does not name %s: %v", body, what, err)
			}
			return err != nil
		}
		ports := func(what string, list []uint16) {
			for _, port := range list {
				if port == 0 {
					t.Errorf("%q: port 0 of %s", body, what)
				}
			}
		}
		for _, of := range []registration.Service{{Name: "api"}, {Name: "api", Peer: "other"}} {
			if list, err := c.VirtualIPs(ctx, of); !refused("read virtual IPs of api", err) {
				for _, addr := range list {
					if !addr.IsValid() || addr.Is4In6() || addr.Zone() != "" {
						t.Errorf("%q: address %s", body, addr)
					}
				}
			}
		}
		if list, err := c.Intentions(ctx); !refused("read intentions", err) {
			for _, i := range list {
				if i.Source.Name == "*" || i.Destination.Name == "*" {
					t.Errorf("%q: intention %+v is of no two services", body, i)
				}
			}
		}
		if list, err := c.GatewayPorts(ctx, registration.Gateway{Service: registration.Service{Name: "in"}, Kind: "ingress-gateway"}); !refused("read listeners of gateway in", err) {
			ports("a gateway", list)
		}
		if checks, err := c.Checks(ctx); !refused("read checks", err) {
			for _, list := range checks {
				ports("a check", list)
			}
		}
		for _, unseen := range []bool{false, true} {
			got, err := c.watchService(ctx, question{of: registration.Service{Name: "api"}, unseen: unseen})
			if !refused("watch instances of api", err) && (got.index == 0 || got.count == 0 && got.oldest > 0) {
				t.Errorf("%q: %+v", body, got)
			}
		}
		if found, err := c.Self(ctx); !refused("read node name", err) && (found.Node == "" || !found.Loopback.IsLoopback()) {
			t.Errorf("%q: node %+v", body, found)
		}
	})
}
