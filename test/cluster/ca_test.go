// SPDX-License-Identifier: MPL-2.0

package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/nomad"
)

// proxy is the Envoy of a service.
type proxy struct {
	alloc   *nomad.Alloc
	service string
}

// proxies are those of a service's instances.
func proxies(job *nomad.Job, group, service string) (list []proxy) {
	for _, a := range job.Allocs() {
		if a.Group == group {
			list = append(list, proxy{a, service})
		}
	}
	return list
}

// certificates are the serial numbers of those by which the proxy is known, to
// connections that are older too.
func (p proxy) certificates() ([]string, error) {
	var told struct {
		Certificates []struct {
			Chain []struct {
				Serial string `json:"serial_number"`
			} `json:"cert_chain"`
		}
	}
	text := p.alloc.Envoy("connect-proxy-"+p.service, p.service, "/certs")
	if err := json.Unmarshal([]byte(text), &told); err != nil {
		return nil, err
	}
	var list []string
	for _, each := range told.Certificates {
		if len(each.Chain) > 0 {
			list = append(list, each.Chain[0].Serial)
		}
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("the proxy of %s has no certificate: %s", p.service, text)
	}
	return list, nil
}

// replaceMeshCA gives the mesh another root, and waits until each proxy has a
// certificate that it signed.
func replaceMeshCA(t *testing.T, n *nomad.Node, list []proxy) {
	t.Helper()
	before := make([][]string, len(list))
	for i, p := range list {
		var err error
		if before[i], err = p.certificates(); err != nil {
			t.Fatal(err)
		}
	}
	n.ReplaceMeshCA()
	test.EventuallyIn(t, patience, func() (problems error) {
		for i, p := range list {
			now, err := p.certificates()
			former := func(serial string) bool { return slices.Contains(before[i], serial) }
			if err == nil && !slices.ContainsFunc(now, func(serial string) bool { return !former(serial) }) {
				err = fmt.Errorf("the proxy of %s has no other certificates than %q", p.service, now)
			}
			problems = errors.Join(problems, err)
		}
		return problems
	}, "certificates of the new root")
}
