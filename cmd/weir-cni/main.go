// SPDX-License-Identifier: MPL-2.0

// Command weir-cni is the CNI plugin. It is installed as consul-cni, the name
// that Nomad calls for a transparent_proxy block, and as weir.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/weirmesh/weir/cni"
	"github.com/weirmesh/weir/cni/network"
	"github.com/weirmesh/weir/cni/network/attachment"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/store"
	"golang.org/x/sys/unix"
)

const usage = `This is a CNI plugin: a container runtime runs it, with its request in the
environment (CNI_COMMAND and others) and its configuration on standard input.
Install it in cni_path as consul-cni, and as weir for networks of your own.
`

// version is set by the linker; a plain go build leaves it to the module's.
var version string

func main() {
	name := filepath.Base(os.Args[0])
	if os.Getenv("CNI_COMMAND") == "" {
		// On stdout and before anything else: Nomad looks here for a version.
		fmt.Println(cni.VersionLine(name, moduleVersion()))
		if len(os.Args) > 1 && (os.Args[1] == "-h" || os.Args[1] == "-help" || os.Args[1] == "--help") {
			fmt.Print(usage)
		}
		return
	}
	goFirst()
	// Who ends the plugin ends its wait for another process, and gets an answer of CNI:
	// what it has begun it finishes or takes back.
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	plugin := cni.Plugin{
		Open:               func(paths store.Paths) cni.Datapath { return redirect.New(paths).Until(ctx) },
		Paths:              store.PathsFromEnv(os.Getenv),
		ConfigDir:          os.Getenv("WEIR_CONFIG_DIR"),
		RedirectedByConsul: host.RedirectedByConsul,
		Network:            func(c attachment.Config, stateDir string) cni.Network { return network.New(c, stateDir).Until(ctx) },
		AddressesIn:        cni.AddressesIn,
		Stdout:             os.Stdout,
		Stderr:             os.Stderr,
	}
	skel.PluginMainFuncs(plugin.Funcs(), cni.Versions(), name)
}

func moduleVersion() string {
	if version != "" {
		return version
	}
	if build, ok := debug.ReadBuildInfo(); ok {
		return build.Main.Version
	}
	return ""
}
