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

// readJSON asks for one value, of so many bytes at most. absent is the error of an agent
// that has no such answer, of a version before or by its configuration; nil: there is none.
func readJSON[T any](ctx context.Context, stateDir, path string, limit int, absent error) (value T, err error) {
	response, err := ask(ctx, stateDir, path)
	if err != nil {
		return value, err
	}
	defer response.Body.Close()
	switch code := response.StatusCode; {
	case code == http.StatusOK:
	case absent != nil && (code == http.StatusNotImplemented || code == http.StatusNotFound):
		return value, absent
	default:
		return value, fmt.Errorf("ask agent: answer %s", response.Status)
	}
	var whole T
	if err := json.NewDecoder(&bounded.Reader{From: response.Body, Limit: limit}).Decode(&whole); err != nil {
		return value, fmt.Errorf("ask agent: %w", err)
	}
	return whole, nil
}

// ReadStatus asks the agent whose state is in stateDir.
func ReadStatus(ctx context.Context, stateDir string) (Status, error) {
	const limit = 64 << 20 // bytes; an allocation has one to two thousand
	return readJSON[Status](ctx, stateDir, "/v1/status", limit, nil)
}
