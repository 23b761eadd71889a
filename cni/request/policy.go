// SPDX-License-Identifier: MPL-2.0

package request

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
)

// DefaultConfigDir is where the agent has its configuration. The plugin reads
// the operator's policy there too: Nomad makes the network configuration of
// its bridge mode itself, so it has no place for a key of ours.
const DefaultConfigDir = "/etc/weir.d"

// DefaultProxyUID is the UID of Envoy where nobody says otherwise, as Nomad has it.
const DefaultProxyUID = 101

// policy is what the operator lets the author of a job decide.
type policy struct {
	jobArgs          []string // keys that a job may set, without their prefix
	consulExclusions bool     // a transparent_proxy block may exclude outbound traffic
	proxyUID         uint32   // of a proxy whose job does not say
	source           string   // where jobArgs come from
}

// defaultPolicy lets a job put itself into the mesh and strengthen the guard,
// and lets it take nothing out of the mesh. What a transparent_proxy block
// says stays as it is with Consul's own plugin.
func defaultPolicy() policy {
	return policy{
		jobArgs: DefaultJobArgs(), consulExclusions: true,
		proxyUID: DefaultProxyUID, source: "the default",
	}
}

// readPolicy is the default, overridden by the files in the configuration
// directory in lexical order, and then by the network configuration. What
// cannot be read is an error and not the default: an operator may have
// forbidden in it what the default allows. dir is what the environment says;
// it wins over the key configDir.
func readPolicy(network Network, dir string) (policy, error) {
	p := defaultPolicy()
	if dir == "" {
		text, err := decodeText(network.ConfigDir)
		if err != nil {
			return p, fmt.Errorf("configDir: %w", err)
		}
		if dir = text; dir == "" {
			dir = DefaultConfigDir
		}
	}
	if !filepath.IsAbs(dir) {
		return p, fmt.Errorf("configDir %s: want an absolute path", Quote(dir))
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.hcl"))
	if err != nil {
		return p, fmt.Errorf("list %s: %w", dir, err)
	}
	slices.Sort(files)
	for _, file := range files {
		if err := p.readFile(file); err != nil {
			return p, err
		}
	}
	if !Empty(network.JobArgs) {
		if p.jobArgs, err = decodeList(network.JobArgs); err != nil {
			return p, fmt.Errorf("jobArgs: %w", err)
		}
		p.source = "jobArgs of the network configuration"
	}
	if !Empty(network.ConsulExclusions) {
		if p.consulExclusions, err = decode[bool](network.ConsulExclusions, "true or false"); err != nil {
			return p, fmt.Errorf("consulExclusions: %w", err)
		}
	}
	return p, p.known()
}

// known refuses names that no argument has.
func (p policy) known() error {
	for _, name := range p.jobArgs {
		if !slices.Contains(JobArgs(), name) {
			return fmt.Errorf("%s: %s: want names of %s", p.source, Quote(name), jobArgNames())
		}
	}
	return nil
}

// CheckPolicy reports what the plugin would refuse in files of the configuration
// directory, in their order.
func CheckPolicy(files []string) error {
	p := defaultPolicy()
	for _, file := range files {
		if err := p.readFile(file); err != nil {
			return err
		}
	}
	return p.known()
}

// allow refuses the first argument that a job may not set.
func (p policy) allow(args []Arg) error {
	for _, arg := range args {
		if slices.Contains(p.jobArgs, strings.TrimPrefix(arg.Key, ownPrefix)) {
			continue
		}
		allowed := "none"
		if len(p.jobArgs) > 0 {
			allowed = strings.Join(p.jobArgs, ", ")
		}
		return fmt.Errorf("%s: the operator of this node does not let a job set it; allowed by %s: %s", arg.Key, p.source, allowed)
	}
	return nil
}
