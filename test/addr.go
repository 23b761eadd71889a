// SPDX-License-Identifier: MPL-2.0

package test

import "net/netip"

// Addrs are the addresses that the texts name. It panics on one that is none.
func Addrs(texts ...string) (list []netip.Addr) {
	for _, text := range texts {
		list = append(list, netip.MustParseAddr(text))
	}
	return list
}

// Prefixes are the prefixes that the texts name. It panics on one that is none.
func Prefixes(texts ...string) (list []netip.Prefix) {
	for _, text := range texts {
		list = append(list, netip.MustParsePrefix(text))
	}
	return list
}
