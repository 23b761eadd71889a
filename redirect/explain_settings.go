// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"fmt"
	"strings"
)

// Setting is one value that decides about a workload's connections.
type Setting struct {
	Name   string `json:"name"`
	Value  string `json:"value"`
	Source string `json:"source"`
}

func portSource(r *record, port, requested uint16) string {
	switch {
	case port != requested:
		return SourceConsul
	case port == DefaultOutboundPort:
		return SourceDefault
	}
	return SourceJob
}

func dnsText(dns DNS) string {
	switch {
	case dns == DNS{}:
		return ""
	case dns.Port == 0:
		return dns.Address.String()
	case !dns.Address.IsValid():
		return fmt.Sprintf("127.0.0.1:%d", dns.Port)
	}
	return fmt.Sprintf("%s:%d", dns.Address, dns.Port)
}

func join[T any](list []T) string { return strings.Trim(fmt.Sprint(list), "[]") }
