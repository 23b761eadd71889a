// SPDX-License-Identifier: MPL-2.0

package network

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/google/nftables"
)

// Earlier versions had host ports mapped by the reference plugin portmap. What it
// mapped then it ends and repairs, as long as such an allocation lives.

const portmap = "portmap"

// portmapConfig is what the plugin gets. Its iptables backend is never used.
func portmapConfig(r *record) ([]byte, error) {
	conf := map[string]any{
		"cniVersion": r.CNIVersion, "name": r.Name, "type": portmap, "backend": "nftables", "snat": true,
		"runtimeConfig": map[string]any{"portMappings": r.PortMappings},
	}
	if r.Result != nil {
		previous, err := r.Result.GetAsVersion(r.CNIVersion)
		if err != nil {
			return nil, err
		}
		conf["prevResult"] = previous
	}
	return json.Marshal(conf)
}

func runPortmap(r *record, command string) error {
	stdin, err := portmapConfig(r)
	if err == nil {
		_, err = call(r, command, portmap, stdin)
	}
	return err
}

func unmapByPortmap(r *record) error {
	if err := runPortmap(r, "DEL"); err != nil {
		return fmt.Errorf("remove host ports: %w", err)
	}
	return nil
}

// checkPortmap maps anew what is not complete. The plugin adds rules without a
// look at those that are there, so they go first.
func checkPortmap(r *record) (repaired []string, err error) {
	if !atLeast(r.CNIVersion, "0.4.0") || runPortmap(r, "CHECK") == nil {
		return nil, nil
	}
	if err := errors.Join(unmapByPortmap(r), runPortmap(r, "ADD")); err != nil {
		return nil, fmt.Errorf("map host ports: %w", err)
	}
	return []string{"host ports"}, nil
}

// hasPortmapTable reports that the plugin has mapped ports on this node.
func hasPortmapTable() (found bool) {
	_ = withNftables(func(conn *nftables.Conn) error {
		table, err := conn.ListTableOfFamily("cni_hostport", nftables.TableFamilyIPv4)
		found = err == nil && table != nil
		return nil
	})
	return found
}
