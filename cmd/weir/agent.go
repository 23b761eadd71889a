// SPDX-License-Identifier: MPL-2.0

package main

import (
	"io"
	"log/slog"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/hashicorp/cli"

	"github.com/weirmesh/weir/agent"
	"github.com/weirmesh/weir/cni"
)

func newAgent(env env) *command {
	c := newCommand(env, "agent", "Run the node's agent", `  Loads or upgrades the data path, finds every mesh allocation of the node, keeps
  its ports in step with the local Consul agent, guards it, and repairs what
  somebody else took away. It runs until interrupted. Its exit changes nothing
  for what is running.

  The configuration is HCL: a file, or a directory whose .hcl files are read in
  lexical order. The environment wins over it, WEIR_* and Consul's own CONSUL_*,
  and the flags win over both.`).withPaths()
	path := c.flags.String("config", "", "`path` of the configuration, a file or a directory")
	address := c.flags.String("consul", "", "`address` of the local Consul agent; or CONSUL_HTTP_ADDR (default 127.0.0.1:8500)")
	guard := c.flags.String("guard", "", "the node's guard: off, audit or `enforce` (default audit)")
	listen := c.flags.String("telemetry", "", "`address` for metrics and health, as 127.0.0.1:9902 (default: none)")
	level := c.flags.String("log-level", "", "debug, info, warn or `error` (default info)")
	c.do = func() (int, error) {
		config, err := agent.ReadConfig(*path, c.getenv)
		if err != nil {
			return 1, err
		}
		for _, override := range []struct {
			field *string
			value string
		}{
			{&config.PinDir, c.paths.PinDir}, {&config.StateDir, c.paths.StateDir}, {&config.CgroupRoot, c.paths.CgroupRoot},
			{&config.Consul.Address, *address}, {&config.Guard.Default, *guard},
			{&config.Telemetry.Listen, *listen}, {&config.LogLevel, *level},
		} {
			if override.value != "" {
				*override.field = override.value
			}
		}
		instance, err := agent.New(config, agent.Options{
			Log:            newLogger(config, &cli.UiWriter{Ui: c.ui}),
			Notify:         func(state string) { _, _ = daemon.SdNotify(false, state) }, // without a manager there is nobody to tell
			RepairNetworks: func() ([]string, error) { return cni.RepairNetworks(config.StateDir) },
		})
		if err != nil {
			return 1, err
		}
		return 0, instance.Run(c.ctx)
	}
	return c
}

func newLogger(config agent.Config, out io.Writer) *slog.Logger {
	var level slog.Level
	if level.UnmarshalText([]byte(config.LogLevel)) != nil {
		level = slog.LevelInfo // the agent refuses the configuration
	}
	options := &slog.HandlerOptions{Level: level}
	if config.LogJSON {
		return slog.New(slog.NewJSONHandler(out, options))
	}
	return slog.New(slog.NewTextHandler(out, options))
}
