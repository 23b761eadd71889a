// SPDX-License-Identifier: MPL-2.0

package api

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/monitor"
)

// ErrFlowsOff says that the agent does not record flows.
var ErrFlowsOff = errors.New("the agent does not record flows: its configuration says flows { enabled = false }")

// ErrFlowsProblem says that the agent is to record flows and cannot at present.
// What it recorded before was delivered all the same, unless Follow is set.
var ErrFlowsProblem = errors.New("flows are not recorded at present")

// ReadFlows delivers the flows that the agent whose state is in stateDir has for
// the query, until there are no more; with Follow until ctx ends, which is no
// error, or the agent does, or deliver returns an error.
func ReadFlows(ctx context.Context, stateDir string, query FlowQuery, deliver func(Flow) error) error {
	return readLines(ctx, stateDir, "/v1/flows?"+query.Values().Encode(), query.Follow, deliver)
}

// ReadEvents delivers what redirect.Datapath.Events does, from the agent that is
// the one reader of the kernel's ring.
func ReadEvents(ctx context.Context, stateDir string, deliver func(monitor.Event) error) error {
	verdicts := append(bpfmap.AllVerdicts(), bpfmap.EventsLost)
	return readLines(ctx, stateDir, "/v1/events", true, func(event monitor.Event) error {
		if i := slices.IndexFunc(verdicts, func(v bpfmap.Verdict) bool { return v.String() == event.Name }); i >= 0 {
			event.Verdict = verdicts[i]
		}
		return deliver(event)
	})
}

// readLines delivers the JSON objects of an answer, each on a line of its own.
func readLines[T any](ctx context.Context, stateDir, path string, follow bool, deliver func(T) error) error {
	response, err := ask(ctx, stateDir, path)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	switch response.StatusCode {
	case http.StatusOK:
	case http.StatusNotImplemented, http.StatusNotFound: // an agent of a version before flows
		return ErrFlowsOff
	default:
		const most = 1000
		text, _ := io.ReadAll(io.LimitReader(response.Body, most))
		return fmt.Errorf("ask agent: answer %s: %s", response.Status, strings.TrimSpace(string(text)))
	}
	var problem error
	if text := response.Header.Get(FlowProblem); text != "" {
		problem = fmt.Errorf("%w: %s", ErrFlowsProblem, text)
	}
	if problem != nil && follow {
		return problem
	}
	lines := bufio.NewScanner(response.Body)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var value T
		if err := json.Unmarshal(lines.Bytes(), &value); err != nil {
			return fmt.Errorf("read answer of the agent: %w", err)
		}
		if err := deliver(value); err != nil {
			return err
		}
	}
	if ctx.Err() != nil && follow {
		return nil
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("read answer of the agent: %w", err)
	}
	if problem != nil {
		return problem
	}
	if follow {
		return errors.New("the agent ended")
	}
	return nil
}

// FlowProblem is the header of an answer that says why nothing is recorded at
// present, though it is to be.
const FlowProblem = "Weir-Problem"
