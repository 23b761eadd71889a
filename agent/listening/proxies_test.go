// SPDX-License-Identifier: MPL-2.0

package listening

import (
	"testing"

	"github.com/weirmesh/weir/agent/registration"
)

func TestNearestProxyOfATask(t *testing.T) {
	sidecar := func(name string) registration.Proxy {
		return registration.Proxy{Kind: registration.KindSidecar, Self: registration.Service{Name: name + "-sidecar-proxy"}, Service: name}
	}
	proxies := []registration.Proxy{sidecar("web-api"), sidecar("web"), sidecar("web-api-v2"), {Kind: registration.KindAPI, Self: registration.Service{Name: "edge"}}}
	for task, want := range map[string]string{
		"connect-proxy-web": "web", "connect-proxy-web-1a2b3c": "web", "connect-proxy-web-api": "web-api",
		"connect-proxy-web-api-1a2b3c": "web-api", "connect-proxy-web-api-v2": "web-api-v2",
		"connect-proxy-website": "", "edge": "", "": "",
	} {
		for range proxies {
			proxies = append(proxies[1:], proxies[0])
			found, ok := nearest(task, proxies)
			if ok != (want != "") || found.Service != want {
				t.Errorf("task %q is that of %q, %t; want %q", task, found.Service, ok, want)
			}
		}
	}
}
