// SPDX-License-Identifier: MPL-2.0

// Package configfile reads and checks the agent's configuration.
package configfile

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/gohcl"
	"github.com/hashicorp/hcl/v2/hclparse"
	"github.com/weirmesh/weir/agent/web"
	"github.com/weirmesh/weir/cni/request"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
)

// Config is the agent's configuration, defaults filled in. Its HCL is a file or
// a directory of files; what a later file says wins over an earlier one. The
// comment behind a field is its line in docs/configuration.md.
type Config struct {
	PinDir     string           `hcl:"pin_dir,optional"`     // directory of maps, programs and links; the plugin must have the same
	StateDir   string           `hcl:"state_dir,optional"`   // directory of records and of the agent's socket; the plugin must have the same
	CgroupRoot string           `hcl:"cgroup_root,optional"` // root of cgroup v2; empty: found in mountinfo
	LogLevel   string           `hcl:"log_level,optional"`   // `debug`, `info`, `warn`, `error`
	LogJSON    bool             `hcl:"log_json,optional"`    // log lines as JSON
	Consul     *ConsulConfig    `hcl:"consul,block"`
	Guard      *GuardConfig     `hcl:"guard,block"`
	Gate       *GateConfig      `hcl:"gate,block"`
	Proxy      *ProxyConfig     `hcl:"proxy,block"`
	CNI        *CNIConfig       `hcl:"cni,block"`
	Docker     *DockerConfig    `hcl:"docker,block"`
	Telemetry  *TelemetryConfig `hcl:"telemetry,block"`
	Flows      *FlowsConfig     `hcl:"flows,block"`
	Tables     *TablesConfig    `hcl:"tables,block"`
}

// ConsulConfig says how the local Consul agent is reached. Its keys are those
// of Nomad's own consul block where both have one.
type ConsulConfig struct {
	Enabled    bool   `hcl:"enabled,optional"`         // whether Consul is asked at all
	Address    string `hcl:"address,optional"`         // `host:port`, or a URL with `http://`, `https://` or `unix://`
	Token      string `hcl:"token,optional"`           // ACL token
	TokenFile  string `hcl:"token_file,optional"`      // file with the ACL token, read again before each request
	Namespace  string `hcl:"namespace,optional"`       // Consul Enterprise; `*`: all that the token may read
	Partition  string `hcl:"partition,optional"`       // Consul Enterprise
	SSL        bool   `hcl:"ssl,optional"`             // HTTPS
	VerifySSL  bool   `hcl:"verify_ssl,optional"`      // whether Consul's certificate is verified
	CAFile     string `hcl:"ca_file,optional"`         // certificates of the authority, read again for each connection
	CAPath     string `hcl:"ca_path,optional"`         // directory of such files, read again for each connection
	CertFile   string `hcl:"cert_file,optional"`       // client certificate, read again for each connection
	KeyFile    string `hcl:"key_file,optional"`        // its key, read again for each connection
	ServerName string `hcl:"tls_server_name,optional"` // name that Consul's certificate must have
	Watch      bool   `hcl:"watch,optional"`           // keep a blocking query open, so that a change is seen at once
}

// GuardConfig is the node's guard. A job may ask for a stronger one.
type GuardConfig struct {
	Default string `hcl:"default,optional"` // `off`, `audit`, `enforce`; a job strengthens it, never weakens it
	Egress  string `hcl:"egress,optional"`  // `off`, `audit`, `enforce`: what leaves an allocation past its proxy; a job strengthens it, never weakens it
	Forward bool   `hcl:"forward,optional"` // let packets be forwarded through the namespaces of allocations, past their proxies
}

// GateConfig is the start gate: what a new allocation dials waits for its proxy.
type GateConfig struct {
	Timeout string `hcl:"timeout,optional"` // how long after ADD connections wait for a proxy that has not listened yet, at most: a duration up to 10m; `0s`: they are refused at once
}

// ProxyConfig is what is assumed of proxies that no plugin was told about.
type ProxyConfig struct {
	DefaultUID uint32 `hcl:"default_uid,optional"` // UID of proxies that no plugin was told about
}

// CNIConfig says where the node keeps the results of CNI, and what the plugin
// lets a job decide. The plugin reads the latter by itself.
type CNIConfig struct {
	CacheDir         string   `hcl:"cache_dir,optional"`         // libcni's cache, of which `results` is read
	NetNSDir         string   `hcl:"netns_dir,optional"`         // where Nomad makes network namespaces
	JobArgs          []string `hcl:"job_args,optional"`          // which arguments `weir.*` a job may set, these and no others; read by the plugin
	ConsulExclusions bool     `hcl:"consul_exclusions,optional"` // whether a `transparent_proxy` block may exclude outbound ports, CIDRs and UIDs; read by the plugin
}

// DockerConfig says where Docker's engine API is. A node need not have it.
type DockerConfig struct {
	Socket string `hcl:"socket,optional"` // Docker's engine API; empty: Docker is not asked
}

// TelemetryConfig says where metrics and health are shown.
type TelemetryConfig struct {
	Listen string `hcl:"listen,optional"` // `host:port` of `/metrics` and `/health`; empty: nowhere
	Map    string `hcl:"map,optional"`    // who may see the map of the node at `/map/`, with names and connections: `off` (nobody), `loopback` (who comes by this node's own), `any`
}

// FlowsConfig says what is kept of the node's connections, for `weir flows`.
type FlowsConfig struct {
	Enabled bool   `hcl:"enabled,optional"` // whether connections are recorded at all; each costs its process a little more then
	Memory  string `hcl:"memory,optional"`  // the most that the records may take: a number with `KiB`, `MiB` or `GiB`; the oldest give way
	History string `hcl:"history,optional"` // how long they are kept at most: a duration
}

// TablesConfig says what the node's tables have room for. They are made when the node
// has none: at the agent's first start after a boot, as its unit comes before Nomad's.
type TablesConfig struct {
	Workloads uint32 `hcl:"workloads,optional"` // allocations in the mesh that the node's tables have room for when they are made: each costs some 380 bytes at once
	Origins   uint32 `hcl:"origins,optional"`   // destination addresses of all allocations that they have room for: each costs 32 bytes at once, and some 140 more while it is in use
}

// Sizes are those of the data path.
func (c *TablesConfig) Sizes() bpfmap.Sizes {
	return bpfmap.Sizes{Workloads: c.Workloads, Origins: c.Origins}
}

// DefaultConfig is the configuration of a node whose files say nothing.
func DefaultConfig() Config {
	return Config{
		PinDir:   store.DefaultPinDir,
		StateDir: store.DefaultStateDir,
		LogLevel: "info",
		Consul:   &ConsulConfig{Enabled: true, Address: "127.0.0.1:8500", VerifySSL: true, Watch: true},
		Guard:    &GuardConfig{Default: string(workload.GuardAudit), Egress: string(workload.GuardOff)},
		Gate:     &GateConfig{Timeout: "30s"},
		Proxy:    &ProxyConfig{DefaultUID: request.DefaultProxyUID},
		CNI: &CNIConfig{
			CacheDir: "/var/lib/cni", NetNSDir: "/var/run/netns",
			JobArgs: request.DefaultJobArgs(), ConsulExclusions: true,
		},
		Docker:    &DockerConfig{Socket: "/var/run/docker.sock"},
		Telemetry: &TelemetryConfig{Map: string(web.ClientsOff)},
		Flows:     &FlowsConfig{Enabled: true, Memory: "64MiB", History: "1h"},
		Tables:    &TablesConfig{Workloads: bpfmap.DefaultWorkloads, Origins: bpfmap.DefaultOrigins},
	}
}

// ReadConfig returns the defaults, overridden by the files at path and then by
// the environment. An empty path reads no file; a directory stands for its
// files that end in .hcl, in lexical order. An error names file and line.
func ReadConfig(path string, getenv func(string) string) (Config, error) {
	config := DefaultConfig()
	files, err := configFiles(path)
	if err != nil {
		return config, err
	}
	parser := hclparse.NewParser()
	for _, file := range files {
		if problems := config.decode(parser, file); problems.HasErrors() {
			return config, fmt.Errorf("read configuration: %w", diagnostics(problems))
		}
	}
	if err := config.environment(getenv); err != nil {
		return config, err
	}
	return config, nil
}

func configFiles(path string) ([]string, error) {
	if path == "" {
		return nil, nil
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	if !info.IsDir() {
		return []string{path}, nil
	}
	files, err := filepath.Glob(filepath.Join(path, "*.hcl"))
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	slices.Sort(files)
	return files, nil
}

// decode sets what the file says and leaves the rest: gohcl touches neither
// attributes nor blocks that a file does not have.
func (c *Config) decode(parser *hclparse.Parser, file string) hcl.Diagnostics {
	parsed, problems := parser.ParseHCLFile(file)
	if problems.HasErrors() {
		return problems
	}
	return gohcl.DecodeBody(parsed.Body, nil, c)
}

// diagnostics shows each of the library's problems on a line of its own.
func diagnostics(problems hcl.Diagnostics) error {
	var list []error
	for _, problem := range problems {
		list = append(list, problem)
	}
	return errors.Join(list...)
}

// environment overrides what variables name: Weir's own, and those that every
// tool of Consul's reads.
func (c *Config) environment(getenv func(string) string) error {
	for name, field := range map[string]*string{
		"WEIR_PIN_DIR": &c.PinDir, "WEIR_STATE_DIR": &c.StateDir, "WEIR_CGROUP_ROOT": &c.CgroupRoot,
		"CONSUL_HTTP_ADDR": &c.Consul.Address, "CONSUL_HTTP_TOKEN": &c.Consul.Token, "CONSUL_HTTP_TOKEN_FILE": &c.Consul.TokenFile,
		"CONSUL_NAMESPACE": &c.Consul.Namespace, "CONSUL_PARTITION": &c.Consul.Partition,
		"CONSUL_CACERT": &c.Consul.CAFile, "CONSUL_CAPATH": &c.Consul.CAPath,
		"CONSUL_CLIENT_CERT": &c.Consul.CertFile, "CONSUL_CLIENT_KEY": &c.Consul.KeyFile,
		"CONSUL_TLS_SERVER_NAME": &c.Consul.ServerName,
	} {
		if value := getenv(name); value != "" {
			*field = value
		}
	}
	for name, field := range map[string]*bool{"CONSUL_HTTP_SSL": &c.Consul.SSL, "CONSUL_HTTP_SSL_VERIFY": &c.Consul.VerifySSL} {
		value := getenv(name)
		if value == "" {
			continue
		}
		set, err := strconv.ParseBool(value)
		if err != nil {
			return fmt.Errorf("read environment: %s=%q: want true or false", name, value)
		}
		*field = set
	}
	return nil
}

// Validate reports every value that the agent or the plugin cannot work with.
func (c Config) Validate() error {
	var list []error
	for _, problem := range c.problems() {
		list = append(list, problem)
	}
	if err := errors.Join(list...); err != nil {
		return fmt.Errorf("check configuration: %w", err)
	}
	return nil
}

// Bytes are what the records of flows may take; 0 where Memory does not say.
func (c *FlowsConfig) Bytes() int {
	units := map[string]int{"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
	unit := c.Memory[max(0, len(c.Memory)-3):]
	number, err := strconv.ParseUint(strings.TrimSuffix(c.Memory, unit), 10, 16)
	if err != nil {
		return 0
	}
	return int(number) * units[unit]
}

// Length is how long records of flows are kept; 0 where History does not say.
func (c *FlowsConfig) Length() time.Duration {
	length, err := time.ParseDuration(c.History)
	if err != nil {
		return 0
	}
	return length
}

// longestGate is as long as a connection may wait. Linux gives up after two minutes.
const longestGate = 10 * time.Minute

// ParseGate reads the timeout of a gate.
func ParseGate(text string) (time.Duration, bool) {
	timeout, err := time.ParseDuration(text)
	return timeout, err == nil && timeout >= 0 && timeout <= longestGate
}

// timeout is how long the node's gates stay open.
func (c *GateConfig) Duration() time.Duration {
	timeout, _ := ParseGate(c.Timeout)
	return timeout
}

// Paths are where the data path keeps its state.
func (c Config) Paths() store.Paths {
	return store.Paths{PinDir: c.PinDir, StateDir: c.StateDir, CgroupRoot: c.CgroupRoot}
}

func isHostPort(text string) bool {
	host, port, err := net.SplitHostPort(text)
	if err != nil {
		return false
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return false
	}
	_, err = netip.ParseAddr(host)
	return host == "" || host == "localhost" || err == nil
}

// SplitAddress takes Consul's address apart: "" is a scheme that it leaves open.
func SplitAddress(address string) (scheme, rest string, err error) {
	scheme, rest, found := strings.Cut(address, "://")
	if !found {
		scheme, rest = "", address
	}
	switch scheme {
	case "unix":
		if !filepath.IsAbs(rest) {
			return "", "", fmt.Errorf("%s: want an absolute path", address)
		}
		return scheme, rest, nil
	case "", "http", "https":
		parsed, err := url.Parse("http://" + rest)
		if err != nil {
			return "", "", fmt.Errorf("%s: %w", address, err)
		}
		if parsed.Hostname() == "" || parsed.Port() == "" && scheme == "" {
			return "", "", fmt.Errorf("%s: want host:port", address)
		}
		return scheme, rest, nil
	}
	return "", "", fmt.Errorf("%s: unknown scheme %s", address, scheme)
}
