// SPDX-License-Identifier: MPL-2.0

// Package peer drives Consul's nftables engine.
package peer

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"time"
)

// A Peer is Consul's nftables engine, the program of ../nftables, which sets up one
// namespace after the other and takes the time itself: in process, like the
// iptables engine in the program that measures.
type Peer struct {
	cmd      *exec.Cmd
	stdin    io.Closer
	requests *json.Encoder
	answers  *json.Decoder
}

// Start runs the program.
func Start(program string) (*Peer, error) {
	p := &Peer{cmd: exec.Command(program, "serve")}
	p.cmd.Stderr = os.Stderr
	stdin, err := p.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.stdin, p.requests, p.answers = stdin, json.NewEncoder(stdin), json.NewDecoder(stdout)
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start Consul's nftables engine: %w", err)
	}
	return p, nil
}

// Setup redirects a namespace, by the configuration of either engine.
func (p *Peer) Setup(config any) (wall, cpu time.Duration, err error) {
	var took struct {
		Wall, CPU time.Duration
		Error     string
	}
	if err := errors.Join(p.requests.Encode(config), p.answers.Decode(&took)); err != nil {
		return 0, 0, fmt.Errorf("ask Consul's nftables engine: %w", err)
	}
	if took.Error != "" {
		return 0, 0, fmt.Errorf("set up by Consul's nftables engine: %s", took.Error)
	}
	return took.Wall, took.CPU, nil
}

// Stop ends the program.
func (p *Peer) Stop() error { return errors.Join(p.stdin.Close(), p.cmd.Wait()) }
