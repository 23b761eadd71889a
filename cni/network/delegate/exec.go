// SPDX-License-Identifier: MPL-2.0

package delegate

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/types/create"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/weirmesh/weir/cni/network/attachment"
	"golang.org/x/sys/unix"
)

// This file is what package invoke of the CNI library does. That one links
// tracing and HTTP in, whose start took a tenth of every ADD.

// Find looks for a plugin in the directories of CNI_PATH.
func Find(plugin, path string) (string, error) {
	// CNI: a name is never a path.
	if plugin != "" && plugin == filepath.Base(plugin) {
		for _, dir := range filepath.SplitList(path) {
			program := filepath.Join(dir, plugin)
			if file, err := os.Stat(program); err == nil && file.Mode().IsRegular() {
				return program, nil
			}
		}
	}
	return "", fmt.Errorf("plugin %q in CNI_PATH %q: %w", plugin, path, attachment.ErrMissing)
}

// Call runs another plugin for the attachment. Only ADD has a result.
func Call(ctx context.Context, r *attachment.Record, command, plugin string, stdin []byte) (types.Result, error) {
	if plugin == HostLocal {
		return hostLocal(r, command, stdin)
	}
	program, err := Find(plugin, r.Path)
	if err != nil {
		return nil, err
	}
	stdout, err := Run(ctx, program, stdin,
		"CNI_COMMAND="+command, "CNI_CONTAINERID="+r.Key.ContainerID, "CNI_NETNS="+r.NetNS, "CNI_IFNAME="+r.Key.IfName,
		"CNI_ARGS="+plainArgs(r.Args), "CNI_PATH="+r.Path)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", plugin, command, err)
	}
	if command != "ADD" {
		return nil, nil
	}
	result, err := DecodeResult(stdin, stdout)
	if err != nil {
		return nil, fmt.Errorf("%s %s: result: %w", plugin, command, err)
	}
	return result, nil
}

// undoTimeout is how long another plugin may take for who takes back what a call made:
// that is not given up with the call, and not kept waiting for ever.
const undoTimeout = 30 * time.Second

// Run runs a plugin with the environment of this one, changed by env, until the context
// ends: then the plugin is asked to end, and soon killed. A plugin that fails says why on
// stdout.
func Run(ctx context.Context, program string, stdin []byte, env ...string) ([]byte, error) {
	const (
		busy = 5 * time.Second // while a package manager writes the program
		soon = 5 * time.Second
	)
	if ctx.Done() == nil {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, undoTimeout)
		defer cancel()
	}
	for deadline := time.Now().Add(busy); ; {
		var stdout, stderr bytes.Buffer
		command := exec.CommandContext(ctx, program)
		command.Cancel, command.WaitDelay = func() error { return command.Process.Signal(unix.SIGTERM) }, soon
		command.Env = append(os.Environ(), env...) // of a name that is there twice the last one counts
		command.Stdin, command.Stdout, command.Stderr = bytes.NewReader(stdin), &stdout, &stderr
		err := command.Run()
		if errors.Is(err, unix.ETXTBSY) && time.Now().Before(deadline) {
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		if err != nil && ctx.Err() != nil {
			return nil, fmt.Errorf("it did not end in time: %w", ctx.Err())
		}
		if err != nil {
			return nil, pluginError(err, stdout.Bytes(), stderr.String())
		}
		return stdout.Bytes(), nil
	}
}

func pluginError(err error, stdout []byte, stderr string) error {
	var said types.Error
	if json.Unmarshal(stdout, &said) == nil && said.Msg != "" {
		return &said
	}
	return fmt.Errorf("%w: %q", err, strings.TrimSpace(string(stdout)+stderr))
}

// DecodeResult reads a result, which has the version of the configuration
// where it names none.
func DecodeResult(config, stdout []byte) (types.Result, error) {
	decoder := version.ConfigDecoder{}
	wanted, err := decoder.Decode(config)
	if err != nil {
		return nil, err
	}
	var fields map[string]any
	if err := json.Unmarshal(stdout, &fields); err != nil {
		return nil, err
	}
	if named, _ := fields["cniVersion"].(string); named != "" {
		return create.Create(named, stdout)
	}
	if fields == nil {
		return nil, errors.New("there is none")
	}
	fields["cniVersion"] = wanted
	if stdout, err = json.Marshal(fields); err != nil {
		return nil, err
	}
	return create.Create(wanted, stdout)
}
