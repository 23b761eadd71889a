// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"crypto/tls"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Tokens of a secure cluster: the one that may do everything, in Consul and in Nomad,
// and those that Consul's agents, Consul's DNS and Nomad's agents show to Consul.
const (
	managementToken = "8e3b0b4c-7d0a-4a52-9d3e-2f3a6f4c9a01"
	agentToken      = "8e3b0b4c-7d0a-4a52-9d3e-2f3a6f4c9a02"
	dnsToken        = "8e3b0b4c-7d0a-4a52-9d3e-2f3a6f4c9a03"
	nomadToken      = "8e3b0b4c-7d0a-4a52-9d3e-2f3a6f4c9a04"
)

// Files of a secure node: what signed all certificates, those of Consul and Nomad
// themselves, and what clients on the node show to both.
const (
	authorityFile = "/etc/tls/ca.pem"
	ClientCert    = "/etc/tls/client.pem"
	clientKey     = "/etc/tls/client-key.pem"
)

// SecureAgent is the block by which Weir's agent reaches a secure node's Consul.
const SecureAgent = `
consul {
  address    = "127.0.0.1:8501"
  ssl        = true
  ca_file    = "` + authorityFile + `"
  cert_file  = "` + ClientCert + `"
  key_file   = "` + clientKey + `"
  token_file = "/etc/weir.d/token"
}
`

// Envoys show no certificate: gRPC asks for none.
const secureConsul = `
ports {
  http     = -1
  https    = 8501
  grpc     = -1
  grpc_tls = 8503
}
tls {
  defaults {
    ca_file         = "` + authorityFile + `"
    cert_file       = "/etc/tls/consul.pem"
    key_file        = "/etc/tls/consul-key.pem"
    verify_incoming = true
    verify_outgoing = true
  }
  grpc {
    verify_incoming = false
  }
  internal_rpc {
    verify_server_hostname = true
  }
}
acl {
  enabled        = true
  default_policy = "deny"
  tokens {
    initial_management = "` + managementToken + `"
    agent              = "` + agentToken + `"
    dns                = "` + dnsToken + `"
  }
}
`

// Consul asks Nomad's servers for the keys of identities, and has no certificate to
// show there: they ask nobody for one, as clients do.
const secureNomad = `
acl {
  enabled = true
}
tls {
  http                   = true
  rpc                    = true
  ca_file                = "` + authorityFile + `"
  cert_file              = "/etc/tls/nomad.pem"
  key_file               = "/etc/tls/nomad-key.pem"
  verify_server_hostname = true
  verify_https_client    = %t
}
consul {
  address      = "127.0.0.1:8501"
  grpc_address = "127.0.0.1:8503"
  grpc_ca_file = "` + authorityFile + `"
  ssl          = true
  ca_file      = "` + authorityFile + `"
  cert_file    = "` + ClientCert + `"
  key_file     = "` + clientKey + `"
  token        = "` + nomadToken + `"
  %s
}
`

// identitiesBlock is what "nomad setup consul" says that servers need.
const identitiesBlock = `
  service_identity {
    aud = ["consul.io"]
    ttl = "1h"
  }
  task_identity {
    aud = ["consul.io"]
    ttl = "1h"
  }
`

// writeSecurity writes what makes the node's services secure.
func (n *Node) writeSecurity() {
	n.tb.Helper()
	if n.leader == nil {
		n.authority = n.tb.TempDir()
		runIn(n.tb, n.authority, n.parts.consul, "tls", "ca", "create")
	} else {
		n.authority = n.leader.authority
	}
	n.IssueCertificates()
	config := secureConsul
	if n.leader == nil { // where servers of peers ask for it
		config += fmt.Sprintf("addresses {\n  grpc_tls = \"127.0.0.1 %s\"\n}\n", n.machine.address)
	}
	n.Write("/etc/consul.d/secure.hcl", config, 0o600)
	n.Write("/etc/nomad.d/server-secure.hcl", fmt.Sprintf(secureNomad, false, identitiesBlock), 0o600)
	n.Write("/etc/nomad.d/client-secure.hcl", fmt.Sprintf(secureNomad, true, ""), 0o600)
}

// IssueCertificates gives a secure node new certificates. Consul takes its own up when
// it is told to reload.
func (n *Node) IssueCertificates() {
	n.tb.Helper()
	kind := "-client"
	if n.leader == nil {
		kind = "-server" // of Nomad one certificate serves both
	}
	authority := filepath.Join(n.authority, "consul-agent-ca")
	files := map[string]string{authorityFile: authority + ".pem"}
	for name, command := range map[string][]string{
		"consul": {n.parts.consul, kind, "-dc", n.datacenter},
		"client": {n.parts.consul, "-client", "-dc", n.datacenter},
		"nomad":  {n.parts.nomad, kind, "-additional-dnsname", "client.global.nomad", "-additional-ipaddress", n.machine.address},
	} {
		cert, key := n.issue(authority, command[0], command[1:]...)
		files["/etc/tls/"+name+".pem"], files["/etc/tls/"+name+"-key.pem"] = cert, key
	}
	for target, source := range files {
		text, err := os.ReadFile(source)
		if err != nil {
			n.tb.Fatalf("issue certificates: %v", err)
		}
		n.Write(target+".new", string(text), 0o600)
		if err := os.Rename(n.Path(target+".new"), n.Path(target)); err != nil {
			n.tb.Fatalf("issue certificates: %v", err)
		}
	}
}

// issue has Consul or Nomad make a certificate, in a directory of its own: they choose
// the name.
func (n *Node) issue(authority, program string, args ...string) (cert, key string) {
	n.tb.Helper()
	dir := n.tb.TempDir()
	runIn(n.tb, dir, append([]string{program, "tls", "cert", "create", "-ca", authority + ".pem", "-key", authority + "-key.pem"}, args...)...)
	keys, _ := filepath.Glob(filepath.Join(dir, "*-key.pem")) // the pattern is well formed
	if len(keys) != 1 {
		n.tb.Fatalf("issue certificate: %s has made %q", program, keys)
	}
	return strings.TrimSuffix(keys[0], "-key.pem") + ".pem", keys[0]
}

// runIn runs a program of this machine in a directory.
func runIn(tb testing.TB, dir string, command ...string) {
	tb.Helper()
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		tb.Fatalf("run %q: %v: %s", command, err, out)
	}
}

// clientTLS shows the certificate of the node's clients, as it is at that moment.
func (n *Node) clientTLS() *tls.Config {
	if !n.options.Secure {
		return nil
	}
	return &tls.Config{
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(n.Path(ClientCert), n.Path(clientKey))
			return &pair, err
		},
		InsecureSkipVerify: true, // the test asks by a socket inside the node
	}
}

// ReloadConsul has Consul read its certificates anew.
func (n *Node) ReloadConsul() {
	n.tb.Helper()
	n.Command("env", append(n.manager(), "consul", "reload")...)
}

// manager is the environment of somebody who may do everything in Consul.
func (n *Node) manager() []string {
	return []string{
		"CONSUL_HTTP_ADDR=https://127.0.0.1:8501", "CONSUL_CACERT=" + authorityFile, "CONSUL_CLIENT_CERT=" + ClientCert,
		"CONSUL_CLIENT_KEY=" + clientKey, "CONSUL_HTTP_TOKEN=" + managementToken,
	}
}

// setUpACLs makes the tokens of Consul's and Nomad's agents, and lets Nomad's own
// command set Consul up for workload identities.
func (n *Node) setUpACLs() {
	n.tb.Helper()
	n.NewConsulToken("agents", "node_prefix \"\" { policy = \"write\" }\nservice_prefix \"\" { policy = \"read\" }", agentToken)
	n.NewConsulToken("dns", "node_prefix \"\" { policy = \"read\" }\nservice_prefix \"\" { policy = \"read\" }", dnsToken)
	n.NewConsulToken("nomad", "agent_prefix \"\" { policy = \"read\" }\nnode_prefix \"\" { policy = \"read\" }\n"+
		"service_prefix \"\" { policy = \"write\" }", nomadToken)
	eventually(n.tb, 30*time.Second, func() error {
		return n.api.server.call(http.MethodPut, "/v1/acl/bootstrap", map[string]string{"BootstrapSecret": managementToken}, nil)
	}, "Nomad's first token")
	n.Command("env", append(n.manager(), "nomad", "setup", "consul", "-y",
		"-jwks-url", "https://"+n.machine.address+":14646/.well-known/jwks.json", "-jwks-ca-file", authorityFile)...)
}

// NewConsulToken makes a token with those rules and no others, and returns its accessor.
func (n *Node) NewConsulToken(name, rules, secret string) (accessor string) {
	n.tb.Helper()
	policy := "test-" + name
	err := n.api.consul.call(http.MethodPut, "/v1/acl/policy", map[string]string{"Name": policy, "Rules": rules}, nil)
	if err != nil {
		n.tb.Fatalf("make policy %s: %v", policy, err)
	}
	var made struct{ AccessorID string }
	err = n.api.consul.call(http.MethodPut, "/v1/acl/token", map[string]any{"SecretID": secret, "Policies": []map[string]string{{"Name": policy}}}, &made)
	if err != nil {
		n.tb.Fatalf("make token of %s: %v", policy, err)
	}
	return made.AccessorID
}

// RevokeConsulToken revokes a token.
func (n *Node) RevokeConsulToken(accessor string) {
	n.tb.Helper()
	if err := n.api.consul.call(http.MethodDelete, "/v1/acl/token/"+accessor, nil, nil); err != nil {
		n.tb.Fatal(err)
	}
}
