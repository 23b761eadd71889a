// SPDX-License-Identifier: MPL-2.0

// Package preflight asks whether Consul would answer what the agent asks, and what its
// token lacks for that.
package preflight

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/catalog/failure"
	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect/health"
)

// TestedConsul is the version that the tests run; leastConsul the first one whose
// proxies can be transparent.
const (
	TestedConsul = "v1.22.2"
	leastConsul  = "v1.10.0"
)

// Beyond these a difference of clocks is told. Consul's certificates for proxies
// are valid from a minute before they are made.
const (
	clockNotice = 10 * time.Second
	clockLimit  = time.Minute
)

// leastRights is the remedy where the token lacks one; docs/install.md has it too.
const leastRights = `give the agent's token node "NODE", agent "NODE" and service_prefix "", each { policy = "read" }; NODE is the name of its Consul node`

// Consul asks Consul what the agent asks, and says what of it is answered.
// services is what Consul has registered on this node; nil where it did not say.
func Consul(ctx context.Context, config configfile.ConsulConfig) (checks []health.Check, services []byte) {
	c := &health.Checks{Group: "consul"}
	if !config.Enabled {
		c.Warn("consul-address", "consul { enabled = true } in the configuration", "Consul is not asked: nothing keeps ports in sync, and no job without transparent_proxy is guarded")
		return c.List, nil
	}
	const timeout = 5 * time.Second
	consul, err := catalog.NewClient(config, timeoutsOf(timeout))
	if err != nil {
		c.Fault("consul-tls", "correct ca_file, ca_path, cert_file and key_file of consul { }", "%v", err)
		return c.List, nil
	}
	if !reachable(ctx, consul, c) {
		return c.List, nil
	}
	return c.List, rights(ctx, consul, c)
}

func timeoutsOf(read time.Duration) catalog.Timeouts {
	return catalog.Timeouts{Read: read, Block: read}
}

// reachable checks address, TLS, leader and clock by the one question that needs
// no token.
func reachable(ctx context.Context, c *catalog.Client, checks *health.Checks) bool {
	var seen catalog.Headers
	ctx, cancel := context.WithTimeout(seen.Watch(ctx), c.Read)
	defer cancel()
	before, leader := time.Now(), ""
	options, err := c.Options(ctx)
	if err != nil {
		checks.Fault("consul-token", "let consul { token_file } name a file that the agent can read", "%v", err)
		return false
	}
	options.Token, options.AllowStale = "", false
	_, err = c.Client.Raw().Query("/v1/status/leader", &leader, options)
	after := time.Now()
	var status api.StatusError
	switch {
	case err != nil && isTLS(err):
		checks.Fault("consul-tls", "set ssl, ca_file, cert_file, key_file and tls_server_name of consul { } to what Consul's agent has", "TLS with Consul at %s: %v", c.Config.Address, failure.Brief(err))
		return false
	case err != nil && !errors.As(err, &status):
		checks.Fault("consul-address", "see whether Consul's agent runs, and whether consul { address } is where it listens", "Consul at %s does not answer: %v", c.Config.Address, err)
		return false
	}
	checks.OK("consul-address", "Consul answers at %s", c.Config.Address)
	if scheme, _, _ := configfile.SplitAddress(c.Config.Address); scheme == "https" || c.Config.SSL && scheme != "unix" {
		if c.Config.VerifySSL {
			checks.OK("consul-tls", "Consul's certificate is verified")
		} else {
			checks.Warn("consul-tls", "set ca_file, and verify_ssl = true", "Consul's certificate is not verified: anybody can answer in its place")
		}
	}
	if err != nil || leader == "" {
		checks.Fault("consul-leader", "see the log of Consul's agent, and whether its servers have a leader", "Consul's servers have no leader%s", orNothing(err))
	} else {
		checks.OK("consul-leader", "Consul's servers have a leader")
	}
	CheckClock(checks, seen.Date, before, after)
	return true
}

func orNothing(err error) string {
	if err == nil {
		return ""
	}
	return fmt.Sprintf(": %v", failure.Brief(err))
}

// isTLS reports an error of the handshake or of its certificates.
func isTLS(err error) bool {
	var (
		verification *tls.CertificateVerificationError
		record       tls.RecordHeaderError
		authority    x509.UnknownAuthorityError
		host         x509.HostnameError
		network      *net.OpError
		status       api.StatusError
	)
	if errors.As(err, &network) && network.Op == "remote error" { // Consul's alert, as for a certificate that it wants
		return true
	}
	if errors.As(err, &status) && strings.Contains(status.Body, "HTTP request to an HTTPS server") {
		return true
	}
	return errors.As(err, &verification) || errors.As(err, &record) || errors.As(err, &authority) || errors.As(err, &host) ||
		errors.Is(err, http.ErrSchemeMismatch)
}

// CheckClock compares the clocks where the answer has a date, which is cut to a
// second.
func CheckClock(checks *health.Checks, date string, before, after time.Time) {
	theirs, err := http.ParseTime(date)
	if err != nil {
		return // Consul does not tell
	}
	var apart time.Duration
	switch {
	case theirs.Before(before.Truncate(time.Second)):
		apart = before.Sub(theirs)
	case theirs.After(after):
		apart = theirs.Sub(after)
	}
	const remedy = "let chrony or systemd-timesyncd set the clocks of this node and of Consul's"
	switch apart = apart.Round(time.Second); {
	case apart > clockLimit:
		checks.Fault("consul-clock", remedy, "the clocks of this node and of Consul are %s apart: proxies refuse each other's certificates", apart)
	case apart > clockNotice:
		checks.Warn("consul-clock", remedy, "the clocks of this node and of Consul are %s apart", apart)
	default:
		checks.OK("consul-clock", "the clocks of this node and of Consul agree")
	}
}

// rights asks what the agent asks, a question for each right of its token.
func rights(ctx context.Context, c *catalog.Client, checks *health.Checks) (services []byte) {
	if token, err := c.Token(); err == nil && token != "" && c.Revoked(ctx) {
		checks.Fault("consul-token", "make a token and put it into the file of consul { token_file }: "+leastRights, "Consul does not know the agent's token")
		return nil
	}
	self, err := c.Self(ctx)
	if err != nil {
		checks.Fault("consul-token-agent", remedyFor(err), "what Consul's agent says of itself, for agent:read: %v", err)
	} else {
		checks.OK("consul-token-agent", "the token may read Consul's agent, whose node is %s", self.Node)
		version, err := version(ctx, c)
		checks.Version("consul-version", "Consul", version, err, TestedConsul, leastConsul)
	}
	got, err := c.Services(ctx)
	switch {
	case err != nil:
		checks.Fault("consul-token-services", remedyFor(err), "the services of this node, for service:read: %v", err)
	case got.Hidden:
		checks.Fault("consul-token-services", leastRights, "Consul hides services of this node from the token: their allocations are not guarded")
	default:
		services = got.Body
		checks.OK("consul-token-services", "the token may read the services of this node")
	}
	if self.Node == "" {
		return services // without its name the node cannot be asked for
	}
	var seen catalog.Headers
	switch _, err := c.Changed(seen.Watch(ctx), self.Node, 0); {
	case err != nil:
		checks.Fault("consul-token-node", remedyFor(err), "the changes of node %s, for node:read: %v", self.Node, err)
	case seen.Filtered && got.Hidden: // the services are what was left out; the remedy names the node's right as well
	case seen.Filtered:
		checks.Fault("consul-token-node", leastRights, "Consul hides node %s from the token: changes are found within seconds, not at once", self.Node)
	default:
		checks.OK("consul-token-node", "the token may follow the changes of node %s", self.Node)
	}
	return services
}

// remedyFor is what to do about a question that is not answered.
func remedyFor(err error) string {
	var status api.StatusError
	if errors.As(err, &status) && status.Code == http.StatusForbidden {
		return leastRights
	}
	return failure.Problem(err).Remedy
}

// version is that of the local agent, as v1.22.2.
func version(ctx context.Context, c *catalog.Client) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, c.Read)
	defer cancel()
	options, err := c.Options(ctx)
	if err != nil {
		return "", err
	}
	var answer struct{ Config struct{ Version string } }
	if _, err := c.Client.Raw().Query("/v1/agent/self", &answer, options); err != nil {
		return "", failure.Brief(err)
	}
	if answer.Config.Version == "" {
		return "", registration.ErrEmpty
	}
	return "v" + answer.Config.Version, nil
}
