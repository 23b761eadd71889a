// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"slices"
	"strings"
)

// task is what Nomad names the task that it injects for the proxy, unless the
// job gives it a name; "" where the job has a task of its own for it.
func (p proxy) task() string {
	switch p.Kind {
	case kindSidecar:
		return "connect-proxy-" + strings.TrimSuffix(p.Self.Name, "-sidecar-proxy")
	case kindMesh, kindIngress, kindTerminating:
		return "connect-" + strings.TrimSuffix(p.Kind, "-gateway") + "-" + p.Self.Name
	}
	return ""
}

// injected are the names of the proxies' tasks. Where the job has a task of that
// name already, Nomad adds a dash and six digits.
func injected(task string, proxies []proxy) bool {
	return slices.ContainsFunc(proxies, func(p proxy) bool {
		name := p.task()
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

// isInjected reports whether a task has the name of one that Nomad injects, for
// whatever service.
func isInjected(task string) bool {
	return slices.ContainsFunc([]string{"connect-proxy-", "connect-mesh-", "connect-ingress-", "connect-terminating-"},
		func(prefix string) bool { return strings.HasPrefix(task, prefix) })
}
