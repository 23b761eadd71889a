// SPDX-License-Identifier: MPL-2.0

// Package catalog asks Consul, follows its changes, and keeps what it said last as
// one Snapshot.
package catalog

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/weirmesh/weir/agent/catalog/failure"
	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/agent/registration"
)

// The bounds of what Consul may cost the agent.
const (
	answerLimit = 8_000_000   // bytes; a proxy's registration has one to two thousand
	Connections = Watches + 2 // of the node itself one waits, the other asks
)

// Timeouts is how long Consul may take to answer.
type Timeouts struct {
	Read  time.Duration // any request but the blocking one
	Block time.Duration // the blocking one, to which Consul adds up to a sixteenth
}

func DefaultTimeouts() Timeouts { return Timeouts{Read: 10 * time.Second, Block: 5 * time.Minute} }

// Client asks the local Consul agent. It is bounded in time, bytes and
// connections, and reads the token's file anew for each request, the files of
// TLS for each connection.
type Client struct {
	Client *api.Client
	Config configfile.ConsulConfig
	Timeouts

	servicesSize atomic.Int64 // of the last answer to Services, in bytes
}

// NewClient opens nothing yet but the files that TLS needs.
func NewClient(config configfile.ConsulConfig, timeouts Timeouts) (*Client, error) {
	scheme, rest, err := configfile.SplitAddress(config.Address)
	if err != nil {
		return nil, fmt.Errorf("configure Consul: %w", err)
	}
	if scheme == "" {
		scheme = "http"
	}
	if config.SSL && scheme != "unix" {
		scheme = "https"
	}
	dialer := &net.Dialer{Timeout: timeouts.Read}
	transport := &http.Transport{
		MaxConnsPerHost: Connections, MaxIdleConnsPerHost: Connections,
		IdleConnTimeout: 90 * time.Second, DialContext: dialer.DialContext,
		DisableCompression: true, // Consul's agent is on this node: it costs both processor time and saves nothing
	}
	conf := &api.Config{Address: rest, Scheme: scheme, Namespace: config.Namespace, Partition: config.Partition}
	switch scheme {
	case "unix":
		transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", rest)
		}
		conf.Address, conf.Scheme = "consul.sock", "http"
	case "https":
		if _, err := clientTLS(config, rest); err != nil {
			return nil, fmt.Errorf("configure Consul: %w", err)
		}
		transport.DialTLSContext = func(ctx context.Context, network, address string) (net.Conn, error) {
			conf, err := clientTLS(config, address)
			if err != nil {
				return nil, err
			}
			return (&tls.Dialer{NetDialer: dialer, Config: conf}).DialContext(ctx, network, address)
		}
	}
	c := &Client{Config: config, Timeouts: timeouts}
	conf.HttpClient = &http.Client{Transport: &boundedTransport{next: transport}}
	if host, prefix, found := strings.Cut(conf.Address, "/"); found {
		conf.Address, conf.PathPrefix = host, "/"+prefix
	}
	if c.Client, err = api.NewClient(conf); err != nil {
		return nil, fmt.Errorf("configure Consul: %w", err)
	}
	return c, nil
}

// clientTLS reads the certificates as they are now. Whoever replaces them needs
// to tell nobody: what cannot be read half way is read again at the next try.
func clientTLS(config configfile.ConsulConfig, address string) (*tls.Config, error) {
	name := config.ServerName
	if name == "" {
		name = address
	}
	conf, err := api.SetupTLSConfig(&api.TLSConfig{
		Address: name, CAFile: config.CAFile, CAPath: config.CAPath, CertFile: config.CertFile, KeyFile: config.KeyFile,
		InsecureSkipVerify: !config.VerifySSL,
	})
	if err != nil {
		return nil, fmt.Errorf("read certificates for Consul: %w", err)
	}
	return conf, nil
}

// Options are those of every request. The token is read anew: whoever
// replaces the file needs to tell nobody.
func (c *Client) Options(ctx context.Context) (*api.QueryOptions, error) {
	token, err := c.Token()
	if err != nil {
		return nil, err
	}
	options := &api.QueryOptions{Token: token, Namespace: c.Config.Namespace, Partition: c.Config.Partition, AllowStale: true}
	return options.WithContext(ctx), nil
}

// answer is what one bulk read brought.
type answer struct {
	Body []byte // of /v1/agent/services, as it came
	// Hidden says that Consul left out what the token may not read, so that
	// nothing can be concluded from what is not there.
	Hidden bool
}

// proxyFilter leaves out plain services, which are most of a node's bytes.
const proxyFilter = `Kind != ""`

// Services is the bulk read: the registrations of every proxy on the node as
// the local agent has them, merged with the central configuration. It costs
// the servers nothing.
func (c *Client) Services(ctx context.Context) (answer, error) {
	got, err := c.services(ctx, proxyFilter, int(c.servicesSize.Load()))
	if err == nil {
		c.servicesSize.Store(int64(len(got.Body)))
	}
	return got, err
}

// ServicesOf are the registrations of proxies that name one of the allocations.
func (c *Client) ServicesOf(ctx context.Context, allocations []string) (answer, error) {
	named := make([]string, len(allocations))
	for i, id := range allocations {
		named[i] = fmt.Sprintf("ID contains %q", id)
	}
	return c.services(ctx, proxyFilter+" and ("+strings.Join(named, " or ")+")", 0)
}

// services reads those that the filter leaves, an answer of about so many bytes.
func (c *Client) services(ctx context.Context, filter string, size int) (answer, error) {
	const room = 4 << 10 // for what is new, and for the reader to see the end
	seen := Headers{whole: true, size: size + room}
	ctx, cancel := context.WithTimeout(seen.Watch(ctx), c.Read)
	defer cancel()
	options, err := c.Options(ctx)
	if err != nil {
		return answer{}, err
	}
	options.Filter = filter
	if _, err := c.Client.Raw().Query("/v1/agent/services", new(Ignored), options); err != nil {
		return answer{}, fmt.Errorf("read services from Consul: %w", failure.Brief(err))
	}
	body := seen.body
	// Consul says so to no anonymous token, which sees nothing where the
	// policy is to deny.
	hidden := seen.Filtered || options.Token == "" && seen.policy == "deny" && len(body) <= len("{}\n")
	return answer{Body: body, Hidden: hidden}, nil
}

// Checks are the ports on which a node's proxies expose health checks, by the
// service whose check it is.
func (c *Client) Checks(ctx context.Context) (map[string][]uint16, error) {
	ctx, cancel := context.WithTimeout(ctx, c.Read)
	defer cancel()
	options, err := c.Options(ctx)
	if err != nil {
		return nil, err
	}
	list, err := c.Client.Agent().ChecksWithFilterOpts("", options)
	if err != nil {
		return nil, fmt.Errorf("read checks from Consul: %w", failure.Brief(err))
	}
	if list == nil {
		return nil, fmt.Errorf("read checks from Consul: %w", registration.ErrEmpty)
	}
	ports := make(map[string][]uint16)
	for _, check := range list {
		if check == nil {
			continue // null is none
		}
		if port, ok := registration.PortNumber(check.ExposedPort); ok {
			ports[check.ServiceID] = append(ports[check.ServiceID], port)
		}
	}
	return ports, nil
}

// self is what the local Consul agent says of itself.
type self struct {
	Node string
	// Loopback is where the proxies' listeners are that name no address: an
	// agent that is bound to IPv6 puts them on ::1 alone (Consul 1.22).
	Loopback netip.Addr
}

func (c *Client) Self(ctx context.Context) (self, error) {
	ctx, cancel := context.WithTimeout(ctx, c.Read)
	defer cancel()
	options, err := c.Options(ctx)
	if err != nil {
		return self{}, err
	}
	var answer struct {
		Config struct{ NodeName, BindAddr string }
	}
	if _, err := c.Client.Raw().Query("/v1/agent/self", &answer, options); err != nil {
		return self{}, fmt.Errorf("read node name from Consul: %w", failure.Brief(err))
	}
	if answer.Config.NodeName == "" {
		return self{}, errors.New("read node name from Consul: the answer has none")
	}
	found := self{Node: answer.Config.NodeName, Loopback: registration.Loopback4()}
	if addr, err := netip.ParseAddr(answer.Config.BindAddr); err == nil && addr.Unmap().Is6() {
		found.Loopback = netip.IPv6Loopback()
	}
	return found, nil
}

// Changed returns when the catalog's view of the node is no longer that of
// index, or after some minutes all the same.
func (c *Client) Changed(ctx context.Context, node string, index uint64) (uint64, error) {
	timeouts := c.Read
	if index > 0 { // else there is nothing to wait for
		timeouts += c.Block + c.Block/8
	}
	ctx, cancel := context.WithTimeout(ctx, timeouts)
	defer cancel()
	options, err := c.Options(ctx)
	if err != nil {
		return 0, err
	}
	options.WaitIndex, options.WaitTime = index, c.Block
	options.Filter = `Service == ""` // only the index is wanted
	var ignored json.RawMessage
	meta, err := c.Client.Raw().Query("/v1/catalog/node-services/"+url.PathEscape(node), &ignored, options)
	if err != nil {
		return 0, fmt.Errorf("wait for changes in Consul: %w", failure.Brief(err))
	}
	if meta.LastIndex == 0 {
		return 0, errors.New("wait for changes in Consul: the answer has no index")
	}
	if meta.LastIndex < index {
		return 0, nil // Consul began anew
	}
	return meta.LastIndex, nil
}

// VirtualIPs are the addresses by which the mesh knows a service.
func (c *Client) VirtualIPs(ctx context.Context, of registration.Service) ([]netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, c.Read)
	defer cancel()
	options, err := c.Options(ctx)
	if err != nil {
		return nil, err
	}
	options.Namespace, options.Partition = of.Namespace, of.Partition
	if of.Peer != "" {
		return c.peerVirtualIPs(of, options)
	}
	var chain struct {
		Chain *struct{ AutoVirtualIPs, ManualVirtualIPs []string }
	}
	if _, err := c.Client.Raw().Query("/v1/discovery-chain/"+url.PathEscape(of.Name), &chain, options); err != nil {
		return nil, fmt.Errorf("read virtual IPs of %s from Consul: %w", of.Name, failure.Brief(err))
	}
	if chain.Chain == nil {
		return nil, fmt.Errorf("read virtual IPs of %s from Consul: %w", of.Name, registration.ErrEmpty)
	}
	return ParseAddresses(slices.Concat(chain.Chain.AutoVirtualIPs, chain.Chain.ManualVirtualIPs)), nil
}

// peerVirtualIPs are the addresses by which the mesh of this cluster knows a
// peer's service, which its imported instances carry: a discovery chain has none.
// A service that the peer does not export, or not yet, has no instance.
func (c *Client) peerVirtualIPs(of registration.Service, options *api.QueryOptions) ([]netip.Addr, error) {
	options.Peer = of.Peer
	var instances []struct {
		Service struct {
			TaggedAddresses map[string]struct{ Address string }
		}
	}
	if _, err := c.Client.Raw().Query("/v1/health/connect/"+url.PathEscape(of.Name), &instances, options); err != nil {
		return nil, fmt.Errorf("read virtual IPs of %s of peer %s from Consul: %w", of.Name, of.Peer, failure.Brief(err))
	}
	if instances == nil {
		return nil, fmt.Errorf("read virtual IPs of %s of peer %s from Consul: %w", of.Name, of.Peer, registration.ErrEmpty)
	}
	var addresses []string
	for _, instance := range instances {
		if virtual, ok := instance.Service.TaggedAddresses["consul-virtual"]; ok {
			addresses = append(addresses, virtual.Address)
		}
	}
	return ParseAddresses(addresses), nil
}

// Intentions are those that allow a service, named by itself, to dial another:
// one bulk read.
func (c *Client) Intentions(ctx context.Context) (allowed []registration.Intention, err error) {
	ctx, cancel := context.WithTimeout(ctx, c.Read)
	defer cancel()
	options, err := c.Options(ctx)
	if err != nil {
		return nil, err
	}
	var list []struct {
		SourceName, SourceNS, SourcePartition, SourcePeer string
		DestinationName, DestinationNS                    string
		DestinationPartition, Action                      string
		Permissions                                       []struct{ Action string }
	}
	if _, err := c.Client.Raw().Query("/v1/connect/intentions", &list, options); err != nil {
		return nil, fmt.Errorf("read intentions from Consul: %w", failure.Brief(err))
	}
	const wildcard = "*"
	for _, i := range list {
		if i.Action != "allow" && len(i.Permissions) == 0 || i.SourcePeer != "" || i.SourceName == wildcard || i.DestinationName == wildcard {
			continue
		}
		allowed = append(allowed, registration.Intention{
			Source:      registration.ServiceOf(i.SourceName, i.SourceNS, i.SourcePartition),
			Destination: registration.ServiceOf(i.DestinationName, i.DestinationNS, i.DestinationPartition),
		})
	}
	slices.SortFunc(allowed, func(a, b registration.Intention) int {
		return cmp.Or(compareServices(a.Source, b.Source), compareServices(a.Destination, b.Destination))
	})
	return slices.Compact(allowed), nil
}

// GatewayPorts are the ports on which a gateway's configuration entry makes it
// listen. Ingress and API gateways have one each.
func (c *Client) GatewayPorts(ctx context.Context, of registration.Gateway) ([]uint16, error) {
	ctx, cancel := context.WithTimeout(ctx, c.Read)
	defer cancel()
	options, err := c.Options(ctx)
	if err != nil {
		return nil, err
	}
	options.Namespace, options.Partition = of.Namespace, of.Partition
	var entry struct {
		Kind      string
		Listeners []struct{ Port int }
	}
	if _, err := c.Client.Raw().Query("/v1/config/"+of.Kind+"/"+url.PathEscape(of.Name), &entry, options); err != nil {
		return nil, fmt.Errorf("read listeners of gateway %s from Consul: %w", of.Name, failure.Brief(err))
	}
	if entry.Kind == "" {
		return nil, fmt.Errorf("read listeners of gateway %s from Consul: %w", of.Name, registration.ErrEmpty)
	}
	var ports []uint16
	for _, listener := range entry.Listeners {
		if port, ok := registration.PortNumber(listener.Port); ok {
			ports = append(ports, port)
		}
	}
	return registration.SortedPorts(ports), nil
}

// concernsOne reports whether others may have an answer all the same: there
// is no error, or Consul refused this question alone.
func concernsOne(err error) bool {
	var status api.StatusError
	return err == nil || errors.As(err, &status) && status.Code < 500 && status.Code != 429
}
