// SPDX-License-Identifier: MPL-2.0

// Engine is the least process that does what consul-cni does to a namespace:
// it takes CONSUL_IPTABLES_CONFIG out of CNI_ARGS, hands it to Consul's own
// engine and passes the previous result on. consul-cni does more than this, so a
// plugin that beats the engine beats consul-cni. Like consul-cni it does nothing
// at DEL and CHECK, and tells its version where no command is given: the tests of
// a real Nomad have it in the place of consul-cni.
package main

import (
	"encoding/json"
	"fmt"
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

// version is one that Nomad's constraint on consul-cni is content with.
const version = "v1.4.2"

func run() error {
	if os.Getenv("CNI_COMMAND") == "" {
		_, err := fmt.Println(version, "Consul's iptables engine, for tests")
		return err
	}
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
		var config iptables.Config
		if err := json.Unmarshal([]byte(text), &config); err != nil {
			return fmt.Errorf("parse CONSUL_IPTABLES_CONFIG: %w", err)
		}
		config.NetNS = os.Getenv("CNI_NETNS")
		if err := iptables.Setup(config, false); err != nil {
			return err
		}
		_, err := os.Stdout.Write(network.PrevResult)
		return err
	}
	return fmt.Errorf("find CONSUL_IPTABLES_CONFIG: CNI_ARGS has none")
}
