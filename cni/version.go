// SPDX-License-Identifier: MPL-2.0

package cni

import (
	"fmt"
	"strings"

	"github.com/containernetworking/cni/pkg/version"
)

// ConsulName is the name under which Nomad looks for the plugin.
const ConsulName = "consul-cni"

// ConsulVersion is the release of consul-cni whose behaviour the plugin
// covers. Nomad wants 1.4.2 or newer under that name before it places a job
// with a transparent_proxy block.
const ConsulVersion = "1.9.4"

// Versions are the CNI versions that the plugin speaks.
func Versions() version.PluginInfo { return version.VersionsStartingFrom("0.3.1") }

// VersionLine is what the plugin prints when it is run without a command.
// Nomad runs every plugin so and takes the first word that reads as a version
// for the plugin's. It is ConsulVersion under Consul's name and Weir's own,
// which is that of its module, under any other.
func VersionLine(name, module string) string {
	if !strings.HasPrefix(module, "v") { // built from a tree without tags
		module = "v0.0.0-development"
	}
	if name == ConsulName {
		return fmt.Sprintf("%s v%s (weir %s)", name, ConsulVersion, module)
	}
	return fmt.Sprintf("%s %s", name, module)
}
