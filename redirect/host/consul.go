// SPDX-License-Identifier: MPL-2.0

package host

import (
	"errors"

	"github.com/weirmesh/weir/redirect/host/consulrules"
)

// RedirectedByConsul reports whether Consul's own engine redirects the
// namespace. Two engines in one namespace would show the proxy wrong origins
// without any error.
func RedirectedByConsul(netns string) (bool, error) {
	ns, err := OpenNamespace(netns)
	if err != nil {
		return false, err
	}
	defer ns.Close()
	return ns.redirectedByConsul()
}

func (ns *Namespace) RefuseConsulRules() error {
	found, err := ns.redirectedByConsul()
	if err != nil {
		return err
	}
	if found {
		return ErrConsulRules
	}
	return nil
}

func (ns *Namespace) redirectedByConsul() (found bool, err error) {
	err = ns.Do(func() error {
		found, err = consulrules.Found()
		return err
	})
	return found, err
}

// ErrConsulRules: Consul's own rules redirect the namespace already.
var ErrConsulRules = errors.New("namespace is redirected by Consul's own iptables or nftables rules")
