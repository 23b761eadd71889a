// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"context"
	"log/slog"
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
