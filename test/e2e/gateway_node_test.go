// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/spawn"
)

const (
	gatewayPort = 8443  // of a gateway's own listener
	adminPort   = 19000 // of Envoy's administration, which the API gateway's job binds to every address
)

// gatewayNode is a node whose allocations reach each other and a service that
// is in no mesh.
type gatewayNode struct{ *meshNode }

func newGatewayNode(t *testing.T) gatewayNode {
	n := newMeshNode(t, false)
	n.runAgent()
	n.consul.Put("/v1/config", object{"Kind": "proxy-defaults", "Name": "global", "Config": object{"protocol": "http"}})
	return gatewayNode{n}
}

// gateway is an allocation with a gateway, and servers and a task in it that have
// nothing to do with the mesh.
type gateway struct {
	*meshAlloc
	kind      string
	open      []uint16 // ports that the guard leaves open
	listeners []uint16 // ... on which its Envoy listens
	traffic   func() error
	foreign   uint16 // of the servers
	client    *test.Client
	elsewhere *test.ServerProcess // outside, where the client dials
}

// start runs the gateway's Envoy, with its administration bound to every
// address.
func (m gatewayNode) start(a *meshAlloc, kind, proxyID string, more ...string) *gateway {
	a.startEnvoy(proxyID, append([]string{"-gateway", kind, "-admin-bind", fmt.Sprintf("0.0.0.0:%d", adminPort)}, more...)...)
	outside := netip.AddrPortFrom(a.addr.Prev(), 7000)
	return &gateway{
		meshAlloc: a, kind: kind, foreign: 7000, client: test.NewClient(m.t, a.spec(1000)),
		elsewhere: test.EchoProcess(m.t, test.Spec{NetNS: m.outside, UID: 1000, GID: 1000}, "tcp4", outside.String()),
	}
}

// registerGateway registers a gateway by the ID that Nomad gives, bound as
// Nomad binds it in bridge mode.
func (a *meshAlloc) registerGateway(kind, name string, binds map[string]uint16) (id string) {
	a.node.t.Helper()
	addresses := object{}
	for bind, port := range binds {
		addresses[bind] = object{"address": "0.0.0.0", "port": port}
	}
	id = fmt.Sprintf("_nomad-task-%s-group-g-%s-%d", a.id, name, gatewayPort)
	if kind == "api" { // for which Nomad injects no task
		a.mapPort(name, 9090)
	} else if a.gatewayTask == nil {
		scope := test.NewCgroup(a.node.t).Child(a.node.t, fmt.Sprintf("%s.connect-%s-%s.scope", a.id, kind, name))
		a.gatewayTask = test.NewClient(a.node.t, test.Spec{NetNS: a.ns, Cgroup: scope, UID: 101, GID: 101})
	}
	a.node.consul.Register(object{"Kind": kind + "-gateway", "Name": name, "ID": id, "Address": a.addr.String(), "Port": gatewayPort, "Proxy": object{
		"Config": object{"envoy_gateway_no_default_bind": true, "envoy_gateway_bind_addresses": addresses},
	}})
	return id
}

// ingress lets HTTP requests from outside in to the service.
func (m gatewayNode) ingress(service, answer string) *gateway {
	const port = 9090
	m.consul.Put("/v1/config", object{"Kind": "ingress-gateway", "Name": "ingress", "Listeners": []object{
		{"Port": port, "Protocol": "http", "Services": []object{{"Name": service, "Hosts": []string{"*"}}}}}})
	a := m.allocate("")
	g := m.start(a, "ingress", a.registerGateway("ingress", "ingress", map[string]uint16{service: port}))
	g.open, g.listeners = []uint16{port}, []uint16{port}
	g.traffic = func() error { return wantBody(client(m.outside), "http://"+g.at(port).String(), answer) }
	return g
}

// apiGateway registers itself, as the jobs for it do: its ID names no
// allocation, and it has no address of its own.
func (m gatewayNode) apiGateway(service, answer string) *gateway {
	const port = 9191
	a := m.allocate("", map[string]any{"hostPort": port, "containerPort": port, "protocol": "tcp"})
	name := a.job()
	m.consul.Put("/v1/config", object{"Kind": "api-gateway", "Name": name, "Listeners": []object{{"Name": "http", "Port": port, "Protocol": "http"}}})
	m.consul.Put("/v1/config", object{"Kind": "http-route", "Name": "route", "Parents": []object{{"Kind": "api-gateway", "Name": name}},
		"Rules": []object{{"Services": []object{{"Name": service}}}}})
	g := m.start(a, "api", name, "-register", "-deregister-after-critical", "10s", "-service", name, "-ignore-envoy-compatibility")
	g.open, g.listeners = []uint16{port}, []uint16{port}
	g.foreign = gatewayPort // under which it is registered, and where it never listens
	g.traffic = func() error { return wantBody(client(m.outside), "http://"+g.at(port).String(), answer) }
	return g
}

// terminating lets a service of the mesh reach two that are in no mesh, one by
// its own listener and one by its virtual IP.
func (m gatewayNode) terminating() *gateway {
	a := m.allocate("")
	legacy, archive := netip.AddrPortFrom(a.addr.Prev(), 7070), netip.AddrPortFrom(a.addr.Prev(), 7071)
	answer := m.serve(m.outside, legacy.String(), "legacy")
	echo := test.EchoProcess(m.t, test.Spec{NetNS: m.outside, UID: 1000, GID: 1000}, "tcp4", archive.String())
	m.consul.Put("/v1/config", object{"Kind": "service-defaults", "Name": "archive", "Protocol": "tcp"})
	for name, at := range map[string]netip.AddrPort{"legacy": legacy, "archive": archive} {
		m.consul.Put("/v1/catalog/register", object{"Node": name, "Address": at.Addr().String(), "Service": object{"Service": name, "Port": at.Port()}})
	}
	m.consul.Put("/v1/config", object{"Kind": "terminating-gateway", "Name": "exit", "Services": []object{{"Name": "legacy"}, {"Name": "archive"}}})
	g := m.start(a, "terminating", a.registerGateway("terminating", "exit", map[string]uint16{"default": gatewayPort}))
	g.open, g.listeners = []uint16{gatewayPort}, []uint16{gatewayPort}

	web := m.allocate("")
	web.startEnvoy(web.register("web", object{"Port": 20002, "Proxy": object{"Upstreams": []object{
		{"DestinationName": "legacy", "LocalBindPort": 9292}, {"DestinationName": "archive", "LocalBindPort": 9393}}}}))
	task, virtual := test.NewClient(m.t, web.spec(1000)), netip.AddrPortFrom(m.virtualIP("archive"), 80)
	g.traffic = func() error {
		if err := wantBody(client(web.ns), "http://127.0.0.1:9292", answer+" to "+a.addr.String()); err != nil {
			return err
		}
		reply, err := task.Ask("tcp4", virtual.String())
		if err == nil && (reply.Server != echo.Name || reply.Peer.Addr() != a.addr) {
			err = fmt.Errorf("%s answers %+v, want %s, which sees %s", virtual, reply, echo.Name, a.addr)
		}
		return err
	}
	return g
}

// meshGateway takes connections that come from other datacenters, by the name
// that they ask for, and passes them on as they are.
func (m gatewayNode) meshGateway(service, answer string) *gateway {
	const lan = 8444
	a := m.allocate("")
	g := m.start(a, "mesh", a.registerGateway("mesh", "mesh", map[string]uint16{"wan": gatewayPort, "lan": lan}))
	g.open, g.listeners = []uint16{gatewayPort, lan}, []uint16{gatewayPort, lan}
	g.traffic = func() error {
		for _, port := range g.listeners {
			config, err := m.remoteProxy("abroad", service)
			if err != nil {
				return err
			}
			abroad := client(m.outside)
			abroad.Transport.(*http.Transport).TLSClientConfig = config
			if err := wantBody(abroad, "https://"+g.at(port).String(), answer); err != nil {
				return err
			}
		}
		return nil
	}
	return g
}

// remoteProxy is how the proxy of a service in another datacenter dials: with
// its own certificate, and with trust in nobody but the service that it asks
// for.
func (m gatewayNode) remoteProxy(source, target string) (*tls.Config, error) {
	var roots struct {
		TrustDomain string
		Roots       []struct{ RootCert string }
	}
	m.consul.Get("/v1/agent/connect/ca/roots", &roots)
	pool := x509.NewCertPool()
	for _, root := range roots.Roots {
		if !pool.AppendCertsFromPEM([]byte(root.RootCert)) {
			return nil, errors.New("read root certificate: it is none")
		}
	}
	var leaf struct{ CertPEM, PrivateKeyPEM string }
	m.consul.Get("/v1/agent/connect/ca/leaf/"+source, &leaf)
	certificate, err := tls.X509KeyPair([]byte(leaf.CertPEM), []byte(leaf.PrivateKeyPEM))
	if err != nil {
		return nil, fmt.Errorf("read certificate of %s: %w", source, err)
	}
	return &tls.Config{
		ServerName: target + ".default.dc1.internal." + roots.TrustDomain, Certificates: []tls.Certificate{certificate},
		InsecureSkipVerify: true, // the name is no DNS name: VerifyConnection looks at it
		VerifyConnection: func(state tls.ConnectionState) error {
			peer := state.PeerCertificates[0]
			if _, err := peer.Verify(x509.VerifyOptions{Roots: pool}); err != nil {
				return err
			}
			if len(peer.URIs) != 1 || !strings.HasSuffix(peer.URIs[0].Path, "/svc/"+target) {
				return fmt.Errorf("the other end is %v, want service %s", peer.URIs, target)
			}
			return nil
		},
	}, nil
}

// at is a port of the allocation.
func (a *meshAlloc) at(port uint16) netip.AddrPort { return netip.AddrPortFrom(a.addr, port) }

// job is the ID of the allocation's job.
func (a *meshAlloc) job() string {
	for _, arg := range a.rt.Args {
		if arg[0] == "NOMAD_JOB_ID" {
			return arg[1]
		}
	}
	return ""
}

// counts are the verdicts on the allocation's connections so far.
func (a *meshAlloc) counts(t *testing.T) map[string]uint64 {
	t.Helper()
	list, err := a.node.Verdicts()
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range list {
		if w.ID == a.id {
			return w.Counts
		}
	}
	t.Fatalf("no verdicts on allocation %s", a.id)
	return nil
}

// serve runs an HTTP server in the namespace, and returns the beginning of what
// it answers: the rest is who asked.
func (m gatewayNode) serve(ns *test.NetNS, addr, name string) (answer string) {
	m.t.Helper()
	var listener net.Listener
	var err error
	ns.Do(func() { listener, err = net.Listen("tcp4", addr) })
	if err != nil {
		m.t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		fmt.Fprintf(w, "%s at %s to %s", name, addr, host)
	})}
	done := make(chan error, 1)
	go func() { done <- server.Serve(listener) }()
	m.t.Cleanup(func() {
		if err := errors.Join(server.Close(), <-done); !errors.Is(err, http.ErrServerClosed) {
			m.t.Errorf("server %s ended: %v", name, err)
		}
	})
	return fmt.Sprintf("%s at %s", name, addr)
}

// client sends each request from the namespace over a connection of its own.
func client(ns *test.NetNS) *http.Client {
	return &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: spawn.Dialer(ns.Path)}}
}

func wantBody(client *http.Client, url, want string) error {
	body, err := get(client, url)
	if err == nil && !strings.HasPrefix(body, want) {
		err = fmt.Errorf("%s answers %q, want %q", url, body, want)
	}
	return err
}

func get(client *http.Client, url string) (body string, err error) {
	response, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if response.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%s answers %s: %q", url, response.Status, text)
	}
	return strings.TrimSpace(string(text)), err
}

// ready asks Envoy's administration for its state.
func ready(from *test.NetNS, admin netip.AddrPort) (status string, err error) {
	return get(client(from), "http://"+admin.String()+"/ready")
}

// dials connects, and no more.
func dials(from *test.NetNS, target netip.AddrPort) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	conn, err := spawn.Dialer(from.Path)(ctx, "tcp4", target.String())
	if err != nil {
		return err
	}
	return conn.Close()
}
