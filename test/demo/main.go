// SPDX-License-Identifier: MPL-2.0

// Command demo shows what Weir does to one connection, on real parts: two
// allocations made by calling the plugin as Nomad calls it, a real Envoy in
// each, a plain HTTP service in the one and a plain HTTP client in the other.
// Where a Consul is at hand, it takes both over into its mesh, with weir agent.
//
// It needs root, bin/weir, bin/weir-cni and an Envoy (make demo gets them). It touches
// nothing of the machine's own network, has its own place for pins, records
// and cgroups, and removes all of it. It ends with an error unless every step
// goes as expected.
//
//	go run ./test/demo [-weir bin/weir] [-plugin bin/weir-cni] [-envoy path] [-consul path]
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	consulserver "github.com/weirmesh/weir/test/consul"
	"github.com/weirmesh/weir/test/envoy"
)

// patience is how long the whole demo may take.
const patience = 2 * time.Minute

func main() {
	// The first thread keeps the machine's own namespace for certain.
	runtime.LockOSThread()
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	// The demo is its own client and service: see task.go.
	if len(args) == 2 {
		switch args[0] {
		case "serve":
			return serve(args[1])
		case "get":
			return get(args[1])
		}
	}
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	plugin := flags.String("plugin", "bin/weir-cni", "the plugin's `path`")
	weir := flags.String("weir", "bin/weir", "the `path` of weir")
	server := flags.String("consul", "", "Consul's `path`; below .tools or on PATH where it is not given")
	proxy := flags.String("envoy", "", "Envoy's `path`; on PATH or below .tools where it is not given")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("namespaces, cgroups and eBPF need root: run it with sudo")
	}
	tools, err := findTools(tools{weir: *weir, plugin: *plugin, envoy: *proxy, consul: *server})
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	defer stop()
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("not done after %s", patience))
	defer cancel()
	return show(ctx, newPrinter(os.Stdout, os.Getenv), tools)
}

// tools are the programs that the demo does not bring itself.
type tools struct {
	weir   string
	plugin string
	envoy  string
	consul string // empty: there is none
}

// findTools makes the paths absolute and finds those that were not given.
func findTools(given tools) (found tools, err error) {
	for _, program := range []struct {
		given string
		found *string
	}{{given.weir, &found.weir}, {given.plugin, &found.plugin}} {
		if *program.found, err = filepath.Abs(program.given); err != nil {
			return tools{}, fmt.Errorf("find program: %w", err)
		}
		if _, err := os.Stat(*program.found); err != nil {
			return tools{}, fmt.Errorf("find program: %w: run make build", err)
		}
	}
	found.envoy, found.consul = given.envoy, given.consul
	if found.envoy == "" {
		if found.envoy, err = envoy.Find(); err != nil {
			return tools{}, err
		}
	}
	if found.consul == "" {
		if found.consul, err = consulserver.Find(); err != nil && !errors.Is(err, consulserver.ErrNotInstalled) {
			return tools{}, err
		}
	}
	return found, nil
}
