// SPDX-License-Identifier: MPL-2.0

package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"

	"github.com/weirmesh/weir/agent/bounded"
)

// SocketName is the agent's local API in the state directory.
const SocketName = "agent.sock"

// ErrNotRunning says that no agent answers on the local API.
var ErrNotRunning = errors.New("the agent does not run")

// ask sends a request to the agent whose state is in stateDir.
func ask(ctx context.Context, stateDir, path string) (*http.Response, error) {
	socket := filepath.Join(stateDir, SocketName)
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
	}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent"+path, nil)
	if err != nil {
		return nil, fmt.Errorf("ask agent: %w", err)
	}
	response, err := client.Do(request)
	var dial *net.OpError
	if errors.As(err, &dial) && dial.Op == "dial" {
		return nil, fmt.Errorf("ask agent: %w: %w", ErrNotRunning, err)
	}
	if err != nil {
		return nil, fmt.Errorf("ask agent: %w", err)
	}
	return response, nil
}

// ReadStatus asks the agent whose state is in stateDir.
func ReadStatus(ctx context.Context, stateDir string) (Status, error) {
	response, err := ask(ctx, stateDir, "/v1/status")
	if err != nil {
		return Status{}, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return Status{}, fmt.Errorf("ask agent: answer %s", response.Status)
	}
	const statusLimit = 64 << 20 // bytes; an allocation has one to two thousand
	var status Status
	if err := json.NewDecoder(&bounded.Reader{From: response.Body, Limit: statusLimit}).Decode(&status); err != nil {
		return Status{}, fmt.Errorf("ask agent: %w", err)
	}
	return status, nil
}
