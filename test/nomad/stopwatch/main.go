// SPDX-License-Identifier: MPL-2.0

// Command stopwatch takes the time of CNI plugins. It stands in cni_path under the
// names of the plugins, which are in the directory "real" beside it, runs the one of
// its own name and appends a wire.Call to the file "calls" there. What a plugin
// delegates to is found in "real", and so counted once. Its own start is not in the
// time.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/weirmesh/weir/test/nomad/wire"
)

func main() {
	code, err := run()
	if err != nil {
		fmt.Fprintln(os.Stderr, "stopwatch:", err)
		os.Exit(1)
	}
	os.Exit(code)
}

func run() (code int, err error) {
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	name, home := filepath.Base(self), filepath.Dir(filepath.Dir(self))
	realDir := filepath.Join(home, "real")
	plugin := filepath.Join(realDir, name)
	call := wire.Call{Plugin: name, Command: os.Getenv("CNI_COMMAND"), Container: os.Getenv("CNI_CONTAINERID")}
	if call.Container == "" {
		return 0, syscall.Exec(plugin, append([]string{plugin}, os.Args[1:]...), os.Environ()) // asked for its version
	}
	cmd := exec.Command(plugin)
	cmd.Env = append(os.Environ(), "CNI_PATH="+realDir)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	call.Start = time.Now()
	err = cmd.Run()
	call.Took = time.Since(call.Start)
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return 0, err
	}
	call.Code = cmd.ProcessState.ExitCode()
	line, err := json.Marshal(call)
	if err != nil {
		return 0, err
	}
	calls, err := os.OpenFile(filepath.Join(home, "calls"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return 0, err
	}
	if _, err := calls.Write(append(line, '\n')); err != nil {
		return 0, errors.Join(err, calls.Close())
	}
	return call.Code, calls.Close()
}
