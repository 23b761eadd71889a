// SPDX-License-Identifier: MPL-2.0

// Engine is the least process that does what consul-cni does to a namespace:
// it takes CONSUL_IPTABLES_CONFIG out of CNI_ARGS and hands it to Consul's own
// engine. consul-cni does more than this, so a plugin that beats the engine
// beats consul-cni.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/hashicorp/consul/sdk/iptables"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
		return fmt.Errorf("read network configuration: %w", err)
	}
	for arg := range strings.SplitSeq(os.Getenv("CNI_ARGS"), ";") {
		text, found := strings.CutPrefix(arg, "CONSUL_IPTABLES_CONFIG=")
		if !found {
			continue
		}
		var config iptables.Config
		if err := json.Unmarshal([]byte(text), &config); err != nil {
			return fmt.Errorf("parse CONSUL_IPTABLES_CONFIG: %w", err)
		}
		config.NetNS = os.Getenv("CNI_NETNS")
		return iptables.Setup(config, false)
	}
	return fmt.Errorf("find CONSUL_IPTABLES_CONFIG: CNI_ARGS has none")
}
