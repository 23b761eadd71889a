// SPDX-License-Identifier: MPL-2.0

// Command demo shows what Weir does to one connection, on real parts: two
// allocations made by calling the plugin as Nomad calls it, a real Envoy in
// each, a plain HTTP service in the one and a plain HTTP client in the other.
//
// It needs root, bin/weir-cni and an Envoy (make demo gets both). It touches
// nothing of the machine's own network, has its own place for pins, records
// and cgroups, and removes all of it. It ends with an error unless every step
// goes as expected.
//
//	go run ./test/demo [-plugin bin/weir-cni] [-envoy path]
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
	tools, err := findTools(*plugin, *proxy)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	defer stop()
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("not done after %s", patience))
	defer cancel()
	return show(ctx, newPrinter(os.Stdout, os.Getenv), tools)
}

// tools are the two programs that the demo does not bring itself.
type tools struct {
	plugin string
	envoy  string
}

func findTools(plugin, proxy string) (tools, error) {
	plugin, err := filepath.Abs(plugin)
	if err != nil {
		return tools{}, fmt.Errorf("find plugin: %w", err)
	}
	if _, err := os.Stat(plugin); err != nil {
		return tools{}, fmt.Errorf("find plugin: %w: run make build", err)
	}
	if proxy == "" {
		if proxy, err = envoy.Find(); err != nil {
			return tools{}, err
		}
	}
	return tools{plugin: plugin, envoy: proxy}, nil
}
