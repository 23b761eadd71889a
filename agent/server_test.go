// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/test"
)

func TestSecondAgentIsRefused(t *testing.T) {
	n := newNode(t)
	n.run()
	test.Eventually(t, func() error {
		_, err := api.ReadStatus(context.Background(), n.config.StateDir)
		return err
	}, "the first agent to answer")
	second, err := New(n.config, Options{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	if err := second.Run(context.Background()); err == nil || !strings.Contains(err.Error(), "another agent") {
		t.Errorf("run of a second agent = %v, want it refused", err)
	}
	info, err := os.Stat(filepath.Join(n.config.StateDir, api.SocketName))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket of the first agent = %v, %v; want it there with mode 0600", info, err)
	}
}

// An agent whose address somebody else has leaves its socket to the one that follows, which
// begins at once: it does not take its predecessor for another agent, nor lose the socket
// to it afterwards.
func TestSocketIsLeftToTheNextAgent(t *testing.T) {
	n := newNode(t)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	begin := func(telemetry string) (*Agent, error) {
		n.config.Telemetry.Listen = telemetry
		a, err := New(n.config, Options{Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		return a, a.server.Listen()
	}
	for i := range test.Scale(500) {
		if _, err := begin(taken.Addr().String()); err == nil || !strings.Contains(err.Error(), "address already in use") {
			t.Fatalf("%d: listen at a taken address: %v", i, err)
		}
		next, err := begin("")
		if err != nil {
			t.Fatalf("%d: listen after an agent that failed: %v", i, err)
		}
		_, lost := os.Stat(filepath.Join(n.config.StateDir, api.SocketName))
		if err := errors.Join(lost, next.server.Close()); err != nil {
			t.Fatalf("%d: %v", i, err)
		}
	}
}
