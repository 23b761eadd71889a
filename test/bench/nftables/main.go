// SPDX-License-Identifier: MPL-2.0

// Nftables is Consul's nftables engine as a process of its own: the version of
// consul/sdk that has it has the iptables engine no more, so one program cannot
// have both. As a plugin it is the least that does what consul-cni does to a
// namespace, like ../engine. With the argument "serve" it sets up one namespace
// for each configuration on its standard input and says how long that took: the
// engine in process, without the start of a program.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/hashicorp/consul/sdk/nftables"
)

func main() {
	var err error
	if len(os.Args) == 2 && os.Args[1] == "serve" {
		err = serve(os.Stdin, os.Stdout)
	} else {
		err = plugin()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// An answer says what one set-up took, children included.
type answer struct {
	Wall, CPU time.Duration
	Error     string
}

func serve(in io.Reader, out io.Writer) error {
	requests, answers := json.NewDecoder(in), json.NewEncoder(out)
	for {
		var config nftables.Config
		if err := requests.Decode(&config); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read configuration: %w", err)
		}
		runtime.GC() // an empty heap keeps the collector out
		before, start := cpuTime(), time.Now()
		err := nftables.Setup(config, false)
		took := answer{Wall: time.Since(start), CPU: cpuTime() - before}
		if err != nil {
			took.Error = err.Error()
		}
		if err := answers.Encode(took); err != nil {
			return err
		}
	}
}

func cpuTime() (total time.Duration) {
	for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var usage syscall.Rusage
		_ = syscall.Getrusage(who, &usage) // fails for an unknown who only
		total += time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
	}
	return total
}

func plugin() error {
	var network struct{ PrevResult json.RawMessage }
	if err := json.NewDecoder(os.Stdin).Decode(&network); err != nil {
		return fmt.Errorf("read network configuration: %w", err)
	}
	if os.Getenv("CNI_COMMAND") != "ADD" {
		return nil
	}
	for arg := range strings.SplitSeq(os.Getenv("CNI_ARGS"), ";") {
		text, found := strings.CutPrefix(arg, "CONSUL_IPTABLES_CONFIG=")
		if !found {
			continue
		}
		var config nftables.Config
		if err := json.Unmarshal([]byte(text), &config); err != nil {
			return fmt.Errorf("parse CONSUL_IPTABLES_CONFIG: %w", err)
		}
		config.NetNS = os.Getenv("CNI_NETNS")
		if err := nftables.Setup(config, false); err != nil {
			return err
		}
		_, err := os.Stdout.Write(network.PrevResult)
		return err
	}
	return errors.New("find CONSUL_IPTABLES_CONFIG: CNI_ARGS has none")
}
