// SPDX-License-Identifier: MPL-2.0

package configfile

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/test"
)

func noEnv(string) string { return "" }

func TestReadConfigWithoutFiles(t *testing.T) {
	got, err := ReadConfig("", noEnv)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(DefaultConfig(), got); diff != "" {
		t.Errorf("differs from the defaults (-want +got):\n%s", diff)
	}
	if err := got.Validate(); err != nil {
		t.Errorf("the defaults are refused: %v", err)
	}
}

func TestReadConfigLaterFilesWinAndTheEnvironmentOverAll(t *testing.T) {
	dir := t.TempDir()
	test.WriteFile(t, filepath.Join(dir, "10-node.hcl"), `
pin_dir = "/sys/fs/bpf/first"
guard { default = "enforce" }
consul {
  address = "https://127.0.0.1:8501"
  ca_file = "/etc/ca.pem"
}
`)
	test.WriteFile(t, filepath.Join(dir, "20-site.hcl"), `
pin_dir = "/sys/fs/bpf/second"
consul {
  token_file = "/etc/token"
  watch      = false
}
telemetry { listen = "127.0.0.1:9902" }
cni { cache_dir = "/var/lib/other" }
`)
	test.WriteFile(t, filepath.Join(dir, "notes.txt"), `not HCL = = =`)
	env := map[string]string{"WEIR_STATE_DIR": "/run/other", "CONSUL_CACERT": "/etc/env.pem", "CONSUL_HTTP_SSL_VERIFY": "false"}
	got, err := ReadConfig(dir, func(name string) string { return env[name] })
	if err != nil {
		t.Fatal(err)
	}
	want := DefaultConfig()
	want.PinDir, want.StateDir = "/sys/fs/bpf/second", "/run/other"
	want.Guard.Default = "enforce"
	want.Consul.Address, want.Consul.CAFile = "https://127.0.0.1:8501", "/etc/env.pem"
	want.Consul.TokenFile, want.Consul.Watch, want.Consul.VerifySSL = "/etc/token", false, false
	want.Telemetry.Listen, want.CNI.CacheDir = "127.0.0.1:9902", "/var/lib/other"
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("configuration (-want +got):\n%s", diff)
	}
}

func TestConfigErrorsNameTheKey(t *testing.T) {
	for _, c := range []struct{ name, text, env, want string }{
		{"unknown key", "pindir = \"/x\"\n", "", `weir.hcl:1`},
		{"unknown key in a block", "consul {\n  adress = \"x\"\n}\n", "", `weir.hcl:2`},
		{"syntax", "guard {\n", "", "weir.hcl:"},
		{"guard", `guard { default = "on" }`, "", `guard.default = "on"`},
		{"egress guard", `guard { egress = "on" }`, "", `guard.egress = "on"`},
		{"relative path", `pin_dir = "weir"`, "", `pin_dir = "weir"`},
		{"telemetry", `telemetry { listen = "9902" }`, "", `telemetry.listen = "9902"`},
		{"address without port", `consul { address = "consul" }`, "", `consul.address = "consul"`},
		{"address of a strange scheme", `consul { address = "ftp://x:1" }`, "", `consul.address = "ftp://x:1"`},
		{"relative socket", `consul { address = "unix://x" }`, "", `consul.address = "unix://x"`},
		{"half a key pair", `consul { cert_file = "/c" }`, "", `consul.key_file`},
		{"log level", `log_level = "loud"`, "", `log_level = "loud"`},
		{"unknown job argument", `cni { job_args = ["mode", "garud"] }`, "", `cni.job_args = "garud": want names of mode, guard, egress, forward`},
		{"too many workloads", `tables { workloads = 100000 }`, "", `tables.workloads = "100000": want a number from 64 to 65536`},
		{"too few origins", `tables { origins = 0 }`, "", `tables.origins = "0": want a number from 4096 to 8388608`},
		{"environment", "", "maybe", `CONSUL_HTTP_SSL="maybe"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := test.WriteFile(t, filepath.Join(t.TempDir(), "weir.hcl"), c.text)
			config, err := ReadConfig(path, func(name string) string {
				if name == "CONSUL_HTTP_SSL" {
					return c.env
				}
				return ""
			})
			if err == nil {
				err = config.Validate()
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error = %v, want one that has %s", err, c.want)
			}
		})
	}
}

// The example names every key with its default.
func TestExampleConfigurationIsTheDefaults(t *testing.T) {
	text, err := os.ReadFile("../../deploy/weir.d/weir.hcl")
	if err != nil {
		t.Fatal(err)
	}
	setting := regexp.MustCompile(`(?m)^(\s*)# ([a-z_]+ +=)`)
	if found := len(setting.FindAll(text, -1)); found < 20 {
		t.Errorf("%d keys in the example, want all", found)
	}
	path := test.WriteFile(t, filepath.Join(t.TempDir(), "weir.hcl"), string(setting.ReplaceAll(text, []byte("$1$2"))))
	got, err := ReadConfig(path, noEnv)
	if err != nil {
		t.Fatal(err)
	}
	want := DefaultConfig()
	want.Telemetry.Listen = "127.0.0.1:9902"
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("example (-defaults +example):\n%s", diff)
	}
}
