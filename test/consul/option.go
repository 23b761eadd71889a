// SPDX-License-Identifier: MPL-2.0

package consul

import (
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/weirmesh/weir/test"
)

// Option changes how a Consul runs.
type Option func(*Server, settings)

// settings are a block of Consul's configuration.
type settings = map[string]any

// In runs Consul in a namespace that stands for the host and has the address,
// which is the node's. Consul's DNS answers on every address of the namespace, its
// health checks go out from there, and its HTTP API is a Unix socket: that
// reaches into every namespace.
func In(ns *test.NetNS, addr netip.Addr) Option {
	return func(s *Server, config settings) {
		s.netns = ns
		config["bind_addr"] = addr.String()
		s.Address = "unix://" + filepath.Join(s.dir, "http.sock")
		addresses := config["addresses"].(settings)
		addresses["http"], addresses["dns"] = s.Address, "0.0.0.0"
		addresses["grpc_tls"] = addr.String() // where a peer finds it
	}
}

// TLS is Consul's HTTPS API and what a client needs for it.
type TLS struct {
	Address string // host:port
	CA      string // file of the certificate that signed Consul's own
	Cert    string // file of a certificate that Consul asks clients for
	Key     string
}

// WithTLS opens an HTTPS API beside the other one, which answers only those who
// show a certificate of its CA.
func WithTLS() Option {
	return func(s *Server, config settings) {
		s.tb.Helper()
		s.authority(s.dir)
		file := func(name string) string { return filepath.Join(s.dir, name) }
		ports := config["ports"].(settings)
		port := freePorts(s.tb, 1)[0]
		s.TLS = TLS{
			Address: fmt.Sprintf("127.0.0.1:%d", port), CA: file("consul-agent-ca.pem"),
			Cert: file("dc1-client-consul-0.pem"), Key: file("dc1-client-consul-0-key.pem"),
		}
		ports["https"] = port
		config["tls"] = settings{"https": settings{
			"ca_file": s.TLS.CA, "cert_file": file("dc1-server-consul-0.pem"), "key_file": file("dc1-server-consul-0-key.pem"),
			"verify_incoming": true,
		}}
	}
}

// RenewTLS gives the HTTPS API another authority and certificates of its: from
// the next Restart on, nothing that the former one signed is trusted. TLS has
// the same files with another content.
func (s *Server) RenewTLS() {
	s.tb.Helper()
	dir := s.tb.TempDir()
	s.authority(dir)
	entries, err := os.ReadDir(dir)
	if err != nil {
		s.tb.Fatalf("renew certificates: %v", err)
	}
	for _, entry := range entries {
		data, err := os.ReadFile(filepath.Join(dir, entry.Name()))
		if err == nil {
			err = os.WriteFile(filepath.Join(s.dir, entry.Name()), data, 0o600)
		}
		if err != nil {
			s.tb.Fatalf("renew certificates: %v", err)
		}
	}
}

// authority makes a certificate authority in dir by Consul's own command, and
// certificates of it for the server and for a client.
func (s *Server) authority(dir string) {
	s.tb.Helper()
	for _, args := range [][]string{
		{"ca", "create"}, {"cert", "create", "-server", "-dc", "dc1"}, {"cert", "create", "-client", "-dc", "dc1"},
	} {
		cmd := exec.Command(s.binary, append([]string{"tls"}, args...)...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			s.tb.Fatalf("consul tls %v: %v: %s", args, err, out)
		}
	}
}

// WithPeering lets servers of two clusters know each other: the datacenter is
// this one's name, and the peer's.
func WithPeering(datacenter string) Option {
	return func(s *Server, config settings) {
		config["datacenter"], config["node_name"] = datacenter, "node-"+datacenter
		config["peering"] = settings{"enabled": true}
		ports := config["ports"].(settings)
		ports["grpc_tls"] = freePorts(s.tb, 1)[0]
	}
}

// Peer makes other a peer of s, each under the name that the other calls it.
func (s *Server) Peer(other *Server, name, otherName string) {
	s.tb.Helper()
	var token struct{ PeeringToken string }
	err := s.call(http.MethodPost, "/v1/peering/token", settings{"PeerName": otherName}, &token)
	if err == nil {
		err = other.call(http.MethodPost, "/v1/peering/establish", settings{"PeerName": name, "PeeringToken": token.PeeringToken}, nil)
	}
	if err != nil {
		s.tb.Fatal(err)
	}
}
