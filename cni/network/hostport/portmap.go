// SPDX-License-Identifier: MPL-2.0

package hostport

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/google/nftables"
	"github.com/weirmesh/weir/cni/network/attachment"
	"github.com/weirmesh/weir/cni/network/delegate"
	"github.com/weirmesh/weir/cni/network/nft"
)

// Earlier versions had host ports mapped by the reference plugin portmap. What it
// mapped then it ends and repairs, as long as such an allocation lives.

const portmap = "portmap"

// portmapConfig is what the plugin gets. Its iptables backend is never used.
func portmapConfig(r *attachment.Record) ([]byte, error) {
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

func Portmap(ctx context.Context, r *attachment.Record, command string) error {
	stdin, err := portmapConfig(r)
	if err == nil {
		_, err = delegate.Call(ctx, r, command, portmap, stdin)
	}
	return err
}

// UnmapByPortmap has the plugin portmap end the translations that it made, or may have
// made.
func UnmapByPortmap(ctx context.Context, r *attachment.Record) error {
	if r.Mapper != attachment.MapperPortmap && (!r.Lost || r.PortMappings == nil || !HasPortmapTable()) {
		return nil
	}
	if err := Portmap(ctx, r, "DEL"); err != nil {
		return fmt.Errorf("remove host ports: %w", err)
	}
	return nil
}

// checkPortmap maps anew what is not complete. The plugin adds rules without a
// look at those that are there, so they go first.
func checkPortmap(ctx context.Context, r *attachment.Record) (repaired []string, err error) {
	if !attachment.AtLeast(r.CNIVersion, "0.4.0") || Portmap(ctx, r, "CHECK") == nil {
		return nil, nil
	}
	if err := errors.Join(UnmapByPortmap(ctx, r), Portmap(ctx, r, "ADD")); err != nil {
		return nil, fmt.Errorf("map host ports: %w", err)
	}
	return []string{"host ports"}, nil
}

// HasPortmapTable reports that the plugin has mapped ports on this node.
func HasPortmapTable() (found bool) {
	_ = nft.WithNftables(func(conn *nftables.Conn) error {
		table, err := conn.ListTableOfFamily("cni_hostport", nftables.TableFamilyIPv4)
		found = err == nil && table != nil
		return nil
	})
	return found
}
