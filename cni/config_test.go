// SPDX-License-Identifier: MPL-2.0

package cni

import (
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/redirect/store"
)

func TestPathsOfEnvironmentWinOverTheConfigurations(t *testing.T) {
	b := newBench()
	b.Paths = store.Paths{StateDir: "/env/state"}
	if err := b.Del(call("", `{"cniVersion":"1.0.0","name":"n","pinDir":"/conf/pin","stateDir":"/conf/state","cgroupRoot":"/conf/cgroup"}`)); err != nil {
		t.Fatal(err)
	}
	want := store.Paths{PinDir: "/conf/pin", StateDir: "/env/state", CgroupRoot: "/conf/cgroup"}
	if diff := cmp.Diff(want, b.fake.paths); diff != "" {
		t.Errorf("paths (-want +got):\n%s", diff)
	}
}

func TestBadConfiguration(t *testing.T) {
	for stdin, tt := range map[string]struct {
		code uint
		part string
	}{
		`{"cniVersion":"1.0.0","name":"n","pinDir":7}`:                     {types.ErrDecodingFailure, "pinDir"},
		`{"cniVersion":"1.0.0","name":"n","pinDir":"weir"}`:                {types.ErrInvalidNetworkConfig, "pinDir"},
		`{"cniVersion":"1.0.0","name":"n","stateDir":"../weir"}`:           {types.ErrInvalidNetworkConfig, "stateDir"},
		`{"cniVersion":"1.0.0","name":"n","cgroupRoot":"x"}`:               {types.ErrInvalidNetworkConfig, "cgroupRoot"},
		`{"cniVersion":"1.0.0","name":"n","prevResult":{"cniVersion":[]}}`: {types.ErrDecodingFailure, "prevResult"},
		`x`: {types.ErrDecodingFailure, "configuration"},
	} {
		b := newBench()
		wantError(t, b.Add(call(meshArgs, stdin)), tt.code, tt.part)
		if !b.fake.untouched() || b.stdout.Len() != 0 {
			t.Errorf("%s: left behind: %+v, stdout %q", stdin, b.fake, b.stdout.String())
		}
		wantError(t, b.Status(call("", stdin)), tt.code, tt.part)
	}
}

func TestConfigurationOfConsulsPluginIsAccepted(t *testing.T) {
	b := newBench()
	stdin := `{"cniVersion":"1.0.0","name":"n","type":"consul-cni","log_level":"debug","cni_bin_dir":"/opt/cni/bin","cni_net_dir":"/etc/cni",` +
		`"multus":false,"kubeconfig":"x","capabilities":{"portMappings":true},"runtimeConfig":{"portMappings":[]},"ipam":{},"dns":{},"mtu":null,"prevResult":` + prevJSON + `}`
	if err := b.Add(call(meshArgs, stdin)); err != nil {
		t.Fatal(err)
	}
}
