// SPDX-License-Identifier: MPL-2.0

package explain

import (
	"fmt"
	"strings"

	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
)

// Setting is one value that decides about a workload's connections.
type Setting struct {
	Name   string `json:"name"`
	Value  string `json:"value"`
	Source string `json:"source"`
}

func PortSource(r *store.Record, port, requested uint16) string {
	switch {
	case port != requested:
		return SourceConsul
	case port == workload.DefaultOutboundPort:
		return SourceDefault
	}
	return SourceJob
}

func DNSText(dns workload.DNS) string {
	switch {
	case dns == workload.DNS{}:
		return ""
	case dns.Port == 0:
		return dns.Address.String()
	case !dns.Address.IsValid():
		return fmt.Sprintf("127.0.0.1:%d", dns.Port)
	}
	return fmt.Sprintf("%s:%d", dns.Address, dns.Port)
}

func Join[T any](list []T) string { return strings.Trim(fmt.Sprint(list), "[]") }
