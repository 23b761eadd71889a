// SPDX-License-Identifier: MPL-2.0

package configfile

import (
	"cmp"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclparse"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/weirmesh/weir/agent/web"
	"github.com/weirmesh/weir/cni/request"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/workload"
)

// valueProblem is a value that HCL allows and Weir cannot work with.
type valueProblem struct {
	key  string // as consul.address
	text string
}

func (p valueProblem) Error() string { return p.text }

// valueProblems are those of one configuration.
type valueProblems []valueProblem

// want adds a problem unless the value is right.
func (l *valueProblems) want(right bool, key, value, what string) {
	if !right {
		*l = append(*l, valueProblem{key, fmt.Sprintf("%s = %q: want %s", key, value, what)})
	}
}

// problems are all values that the agent or the plugin cannot work with, sorted.
func (c Config) problems() []valueProblem {
	var list valueProblems
	c.checkPlaces(&list)
	c.checkRules(&list)
	c.checkSizes(&list)
	if c.Consul.Enabled {
		c.Consul.check(&list)
	}
	slices.SortFunc(list, func(a, b valueProblem) int { return cmp.Compare(a.text, b.text) })
	return list
}

// checkPlaces checks paths and addresses.
func (c Config) checkPlaces(list *valueProblems) {
	for key, path := range map[string]string{"pin_dir": c.PinDir, "state_dir": c.StateDir, "cni.cache_dir": c.CNI.CacheDir, "cni.netns_dir": c.CNI.NetNSDir} {
		list.want(filepath.IsAbs(path), key, path, "an absolute path")
	}
	for key, path := range map[string]string{"cgroup_root": c.CgroupRoot, "docker.socket": c.Docker.Socket} {
		list.want(path == "" || filepath.IsAbs(path), key, path, "an absolute path, or nothing")
	}
	list.want(c.Telemetry.Listen == "" || isHostPort(c.Telemetry.Listen), "telemetry.listen", c.Telemetry.Listen, "host:port")
}

// checkRules checks what chooses among a few, and durations.
func (c Config) checkRules(list *valueProblems) {
	list.want(slices.Contains([]string{"debug", "info", "warn", "error"}, c.LogLevel), "log_level", c.LogLevel, "debug, info, warn or error")
	for key, guard := range map[string]string{"guard.default": c.Guard.Default, "guard.egress": c.Guard.Egress} {
		list.want(workload.Guard(guard).Known(), key, guard, "off, audit or enforce")
	}
	_, ok := ParseGate(c.Gate.Timeout)
	list.want(ok, "gate.timeout", c.Gate.Timeout, "a duration from 0s to 10m")
	for _, name := range c.CNI.JobArgs {
		list.want(slices.Contains(request.JobArgs(), name), "cni.job_args", name, "names of "+strings.Join(request.JobArgs(), ", "))
	}
	list.want(web.Clients(c.Telemetry.Map).Valid(), "telemetry.map", c.Telemetry.Map, "off, loopback or any")
}

// checkSizes checks how much may be kept.
func (c Config) checkSizes(list *valueProblems) {
	list.want(c.Flows.Bytes() > 0, "flows.memory", c.Flows.Memory, "a number from 1 to 65535 with KiB, MiB or GiB")
	list.want(c.Flows.Length() > 0, "flows.history", c.Flows.History, "a duration, such as 1h")
	for _, size := range []struct {
		key                string
		value, least, most uint32
	}{
		{"tables.workloads", c.Tables.Workloads, bpfmap.MinWorkloads, bpfmap.MaxWorkloads},
		{"tables.origins", c.Tables.Origins, bpfmap.MinOrigins, bpfmap.MaxOrigins},
	} {
		list.want(size.value >= size.least && size.value <= size.most, size.key, fmt.Sprint(size.value), fmt.Sprintf("a number from %d to %d", size.least, size.most))
	}
}

func (c *ConsulConfig) check(list *valueProblems) {
	_, _, err := SplitAddress(c.Address)
	list.want(err == nil, "consul.address", c.Address, "host:port, or a URL with http, https or unix")
	if (c.CertFile == "") != (c.KeyFile == "") {
		key := "consul.cert_file"
		if c.CertFile == "" {
			key = "consul.key_file"
		}
		*list = append(*list, valueProblem{key, "consul.cert_file and consul.key_file: want both or neither"})
	}
}

// CheckedConfig is what can be said of configuration files without a node.
type CheckedConfig struct {
	Files    []string // that were read, in their order
	Problems hcl.Diagnostics
	Sources  map[string]*hcl.File // of which the problems' excerpts are
}

// CheckConfig reads a file, or the .hcl files of a directory, as the agent does
// at its start, and finds all that is wrong with them. It reads nothing else:
// neither the environment, nor what the values name.
func CheckConfig(path string) (CheckedConfig, error) {
	var checked CheckedConfig
	var err error
	if checked.Files, err = configFiles(path); err != nil {
		return checked, err
	}
	config, parser := DefaultConfig(), hclparse.NewParser()
	for _, file := range checked.Files {
		checked.Problems = append(checked.Problems, config.decode(parser, file)...)
	}
	for _, problem := range config.problems() {
		diagnostic := &hcl.Diagnostic{Severity: hcl.DiagError, Summary: "Invalid value", Detail: problem.text + "."}
		for _, file := range checked.Files { // what a later file says wins
			if place := attributeRange(parser.Files()[file], problem.key); place != nil {
				diagnostic.Subject = place
			}
		}
		checked.Problems = append(checked.Problems, diagnostic)
	}
	checked.Sources = maps.Clone(parser.Files())
	return checked, nil
}

// attributeRange is where a file sets a key; nil where it does not.
func attributeRange(file *hcl.File, key string) *hcl.Range {
	if file == nil {
		return nil
	}
	body, ok := file.Body.(*hclsyntax.Body)
	if !ok {
		return nil
	}
	block, name, nested := strings.Cut(key, ".")
	if !nested {
		block, name = "", key
	}
	for _, each := range body.Blocks {
		if each.Type == block {
			body = each.Body
			block = ""
			break
		}
	}
	if attribute := body.Attributes[name]; attribute != nil && block == "" {
		return attribute.Range().Ptr()
	}
	return nil
}
