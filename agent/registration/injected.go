// SPDX-License-Identifier: MPL-2.0

package registration

import (
	"slices"
	"strings"
)

// Task is what Nomad names the task that it injects for the proxy, unless the
// job gives it a name; "" where the job has a task of its own for it.
func (p Proxy) Task() string {
	switch p.Kind {
	case KindSidecar:
		return "connect-proxy-" + strings.TrimSuffix(p.Self.Name, "-sidecar-proxy")
	case KindMesh, KindIngress, kindTerminating:
		return "connect-" + strings.TrimSuffix(p.Kind, "-gateway") + "-" + p.Self.Name
	}
	return ""
}

// Injected are the names of the proxies' tasks. Where the job has a task of that
// name already, Nomad adds a dash and six digits.
func Injected(task string, proxies []Proxy) bool {
	return slices.ContainsFunc(proxies, func(p Proxy) bool {
		name := p.Task()
		if name == "" {
			return false
		}
		rest, found := strings.CutPrefix(task, name)
		return found && (rest == "" || isSuffix(rest))
	})
}

// isSuffix reports what Nomad adds to the name of a task that it injects.
func isSuffix(text string) bool {
	return len(text) == 7 && text[0] == '-' && strings.Trim(text[1:], "0123456789abcdef") == ""
}

// IsInjected reports whether a task has the name of one that Nomad injects, for
// whatever service.
func IsInjected(task string) bool {
	return slices.ContainsFunc([]string{"connect-proxy-", "connect-mesh-", "connect-ingress-", "connect-terminating-"},
		func(prefix string) bool { return strings.HasPrefix(task, prefix) })
}
