// SPDX-License-Identifier: MPL-2.0

package request

import (
	"encoding/json"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Empty reports a JSON value that says nothing: absent, null or {}. Libraries
// write ipam as {} where there is none.
func Empty(value json.RawMessage) bool {
	text := strings.TrimSpace(string(value))
	return text == "" || text == "null" || text == "{}"
}

// decode reads a field; one that is absent or null is the zero value.
func decode[T any](raw json.RawMessage, want string) (T, error) {
	var value T
	if len(raw) == 0 {
		return value, nil
	}
	if err := json.Unmarshal(raw, &value); err != nil {
		return value, fmt.Errorf("%s: want %s", shorten(string(raw)), want)
	}
	return value, nil
}

func decodeText(raw json.RawMessage) (string, error) { return decode[string](raw, "a string") }

func decodeList(raw json.RawMessage) ([]string, error) {
	return decode[[]string](raw, "a list of strings")
}

// decodePort reads a port that is a number in JSON; 0 and absent are the same.
func decodePort(raw json.RawMessage) (uint16, error) {
	return decode[uint16](raw, "a number, 0 to 65535")
}

// parseUID reads a user's number. The one after the last is the kernel's word
// for no user.
func parseUID(text string) (uint32, error) {
	const last = math.MaxUint32 - 1
	n, err := strconv.ParseUint(text, 10, 32)
	if err != nil || n > last {
		return 0, fmt.Errorf("%s: want the user's number, 0 to %d, not a name or a range", Quote(text), uint32(last))
	}
	return uint32(n), nil
}

// parsePorts reads ports and ranges "low:high", of which either end may be
// left out, into a sorted list that names every port once. Its cost does not
// depend on how much the ranges overlap.
func parsePorts(list []string) ([]uint16, error) {
	type span struct{ low, high uint16 }
	spans := make([]span, 0, len(list))
	for _, text := range list {
		low, high, err := parsePortRange(text)
		if err != nil {
			return nil, err
		}
		spans = append(spans, span{low, high})
	}
	slices.SortFunc(spans, func(a, b span) int { return int(a.low) - int(b.low) })
	var ports []uint16
	next := 1 // the lowest port that is not in ports yet
	for _, s := range spans {
		for next = max(next, int(s.low)); next <= int(s.high); next++ {
			ports = append(ports, uint16(next))
		}
	}
	return ports, nil
}

func parsePortRange(text string) (low, high uint16, err error) {
	first, last, isRange := strings.Cut(text, ":")
	if !isRange {
		last = first
	} else {
		if first == "" {
			first = "1"
		}
		if last == "" {
			last = "65535"
		}
	}
	from, errFrom := strconv.ParseUint(first, 10, 16)
	to, errTo := strconv.ParseUint(last, 10, 16)
	if errFrom != nil || errTo != nil || from == 0 || text == ":" {
		return 0, 0, fmt.Errorf("%s: want a port, 1 to 65535, or a range low:high", Quote(text))
	}
	if from > to {
		return 0, 0, fmt.Errorf("%s: the range ends before it begins", Quote(text))
	}
	return uint16(from), uint16(to), nil
}

func parseAddress(text string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(text)
	if err != nil || addr.Zone() != "" {
		return netip.Addr{}, fmt.Errorf("%s: want an IPv4 or IPv6 address", Quote(text))
	}
	return addr.Unmap(), nil
}

// parseCIDR reads a prefix, or an address as the prefix of itself alone. A
// prefix of IPv4 that is written as IPv6 is one of IPv4.
func parseCIDR(text string) (netip.Prefix, error) {
	if !strings.Contains(text, "/") {
		addr, err := parseAddress(text)
		if err != nil {
			return netip.Prefix{}, fmt.Errorf("%s: want an IPv4 or IPv6 address or CIDR", Quote(text))
		}
		return netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	cidr, err := netip.ParsePrefix(text)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%s: want an IPv4 or IPv6 address or CIDR", Quote(text))
	}
	if cidr.Addr().Is4In6() && cidr.Bits() >= 96 {
		cidr = netip.PrefixFrom(cidr.Addr().Unmap(), cidr.Bits()-96)
	}
	return cidr.Masked(), nil
}

// Quote shows a text of the request's in an error: on one line, and not all
// of it when it is long.
func Quote(text string) string { return shorten(strconv.Quote(text)) }

func shorten(text string) string {
	const most = 80
	if len(text) > most {
		return text[:most] + "..."
	}
	return text
}
