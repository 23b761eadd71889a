// SPDX-License-Identifier: MPL-2.0

package main

import (
	"fmt"
	"io/fs"

	"github.com/weirmesh/weir/agent"
	"github.com/weirmesh/weir/redirect"
)

// agentEvents is what an agent would tell that reads the kernel's ring.
func (n *node) agentEvents(deliver func(redirect.Event) error) error {
	if !n.recording {
		return fmt.Errorf("%w: %w", agent.ErrNotRunning, fs.ErrNotExist)
	}
	for _, event := range n.told {
		if err := deliver(event); err != nil {
			return err
		}
	}
	return nil
}

func (n *node) agentFlows(query agent.FlowQuery, deliver func(agent.Flow) error) error {
	n.query = query
	if !n.recording {
		return fmt.Errorf("%w: %w", agent.ErrNotRunning, fs.ErrNotExist)
	}
	for _, flow := range n.flows {
		if err := deliver(flow); err != nil {
			return err
		}
	}
	return n.err
}
