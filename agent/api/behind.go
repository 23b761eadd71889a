// SPDX-License-Identifier: MPL-2.0

package api

import (
	"context"
	"errors"
	"net/netip"
	"net/url"

	"github.com/weirmesh/weir/redirect/workload"
)

// BehindQuery asks what Consul says of what is behind a connection of a workload.
type BehindQuery struct {
	Key     workload.AttachmentID
	To      netip.AddrPort // what is dialled; not valid: Service alone is asked for
	SentTo  netip.AddrPort // the listener in the namespace that gets it; may be not valid
	Service string         // the name by which it is dialled, where no upstream has the address
}

// Behind is what Consul says of what is behind a connection. What it does not say is in
// Unknown with the reason, and is no answer.
type Behind struct {
	Schema     int          `json:"schema"`
	Service    string       `json:"service"`   // that is dialled; empty: the agent knows of none
	Source     string       `json:"source"`    // whose proxy dials it; empty: the agent knows of none
	Intention  Intention    `json:"intention"` // empty: not known
	Instances  *Instances   `json:"instances"` // null: not known
	VirtualIPs []netip.Addr `json:"virtual_ips"`
	Unknown    []Unknown    `json:"unknown"`
}

// Intention is what Consul answers to whether a service may dial another.
type Intention string

// The answers.
const (
	IntentionAllow     Intention = "allow"
	IntentionDeny      Intention = "deny"
	IntentionByRequest Intention = "by_request" // it has permissions: some requests pass
)

// Instances are those of a service in the mesh, by their checks.
type Instances struct {
	Passing int `json:"passing"`
	Warning int `json:"warning"` // get connections, too
	Total   int `json:"total"`
}

// Unknown is what could not be looked at.
type Unknown struct {
	What   string `json:"what"` // "consul", "intention", "instances" or "virtual_ips"
	Why    string `json:"why"`
	Remedy string `json:"remedy"`
}

// ErrNoBehind says that the agent cannot be asked what is behind a connection.
var ErrNoBehind = errors.New("ask agent: it is of a version that does not ask Consul this")

// ReadBehind asks the agent whose state is in stateDir.
func ReadBehind(ctx context.Context, stateDir string, query BehindQuery) (Behind, error) {
	values := url.Values{"container_id": {query.Key.ContainerID}, "interface": {query.Key.IfName}, "service": {query.Service}}
	for name, addr := range map[string]netip.AddrPort{"to": query.To, "sent_to": query.SentTo} {
		if addr.IsValid() {
			values.Set(name, addr.String())
		}
	}
	const limit = 1 << 20 // bytes; an answer has a few hundred
	return readJSON[Behind](ctx, stateDir, "/v1/behind?"+values.Encode(), limit, ErrNoBehind)
}
