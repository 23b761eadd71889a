// SPDX-License-Identifier: MPL-2.0

package network

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/weirmesh/weir/cni/network/attachment"
	"github.com/weirmesh/weir/cni/network/hostport"
	"github.com/weirmesh/weir/redirect/store"
)

// FuzzPortMappings holds what a job asks to be mapped: each mapping that is taken has
// both ports, a protocol that is known and an address as the maps have it.
func FuzzPortMappings(f *testing.F) {
	for _, seed := range []string{
		`[{"hostPort":20001,"containerPort":8080,"protocol":"tcp","hostIP":"192.0.2.1"}]`, `[]`, `null`, `7`, `[{}]`,
		`[{"hostPort":65536,"containerPort":-1}]`, `[{"hostPort":1,"containerPort":1,"protocol":"UDP","hostIP":"::ffff:1.2.3.4%eth0"}]`,
		`[{"hostPort":1,"containerPort":1,"protocol":"icmp"}]`, `[{"hostPort":1,"containerPort":1,"hostIP":"localhost"}]`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		list, err := hostport.ParsePortMappings(raw)
		if err != nil {
			if !strings.Contains(err.Error(), "portMappings") {
				t.Errorf("%q: the error names no field: %v", raw, err)
			}
			return
		}
		for _, mapping := range list {
			if _, err := mapping.Number(); err != nil || mapping.HostPort == 0 || mapping.ContainerPort == 0 {
				t.Errorf("%q: %+v is taken, %v", raw, mapping, err)
			}
			if mapping.HostIP == "" {
				continue
			}
			if addr, err := netip.ParseAddr(mapping.HostIP); err != nil || addr.Is4In6() || addr.Zone() != "" {
				t.Errorf("%q: the host's address is %q, %v", raw, mapping.HostIP, err)
			}
		}
	})
}

// FuzzRecordFile holds records of networks: what cannot be read counts as none, which
// the caller restores, and none of another boot is complete.
func FuzzRecordFile(f *testing.F) {
	for _, seed := range []string{
		"", "{", "null", "[]", `{"complete":true}`, `{"boot_id":"x","complete":true,"result":{}}`, `{"portMappings":7,"result":7}`,
		`{"key":{"container_id":"0b5d0c1e","if_name":"eth0"},"netns":"/proc/self/ns/net","result":{"cniVersion":"1.0.0","ips":[{"address":"172.26.64.2/20"}]}}`,
	} {
		f.Add([]byte(seed))
	}
	path := filepath.Join(f.TempDir(), "record.json")
	boot, err := attachment.BootID()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := attachment.ReadRecordFile(path)
		if err != nil {
			if got != nil || !errors.Is(err, store.ErrUnknown) || !strings.Contains(err.Error(), path) {
				t.Errorf("%q: %+v, %v: want no record, and an error that names the file", data, got, err)
			}
			return
		}
		if got.Complete && (got.BootID != boot || got.Result == nil) {
			t.Errorf("%q: complete, of boot %q, with result %v", data, got.BootID, got.Result)
		}
		if _, err := hostport.Wanted(got); err != nil && !strings.Contains(err.Error(), "portMappings") {
			t.Errorf("%q: the error names no field: %v", data, err)
		}
	})
}
