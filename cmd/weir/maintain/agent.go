// SPDX-License-Identifier: MPL-2.0

package maintain

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"time"

	"github.com/weirmesh/weir/cmd/weir/base"

	systemd "github.com/coreos/go-systemd/v22/daemon"
	"github.com/hashicorp/cli"
	"github.com/weirmesh/weir/agent"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/change"
	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/cni"
	"golang.org/x/sys/unix"
)

func NewAgent(env base.Env) *base.Command {
	c := base.New(env, "agent", "Run the node's agent", `  Loads or upgrades the data path, finds every mesh allocation of the node, keeps
  its ports in sync with the local Consul agent, guards it, and repairs what
  somebody else took away. It runs until interrupted. Its exit changes nothing
  for what is running.

  The configuration is HCL: a file, or a directory whose .hcl files are read in
  lexical order. The environment wins over it, WEIR_* and Consul's own CONSUL_*,
  and the flags win over both. SIGHUP reads it anew; what cannot be used is
  logged, and the agent goes on with what it has.

  Run it with the configuration of a node, and without systemd:

      $ weir agent -config /etc/weir.d`).WithPaths()
	path := c.Flags.String("config", "", "`path` of the configuration, a file or a directory")
	address := c.Flags.String("consul", "", "`address` of the local Consul agent; or CONSUL_HTTP_ADDR (default 127.0.0.1:8500)")
	guard := c.Flags.String("guard", "", "the node's guard: off, audit or `enforce` (default audit)")
	listen := c.Flags.String("telemetry", "", "`address` for metrics and health, as 127.0.0.1:9902 (default: none)")
	level := c.Flags.String("log-level", "", "debug, info, warn or `error` (default info)")
	c.Do = func() (int, error) {
		d := &daemon{
			version: c.Version,
			ctx:     c.Ctx, policyDir: c.Getenv("WEIR_CONFIG_DIR"), out: &cli.UiWriter{Ui: c.UI},
			hangup: make(chan os.Signal, 1), changes: change.NewLog(time.Now()),
		}
		d.read = func() (configfile.Config, error) {
			config, err := configfile.ReadConfig(*path, c.Getenv)
			if err != nil {
				return config, err
			}
			for _, override := range []struct {
				field *string
				value string
			}{
				{&config.PinDir, c.Paths.PinDir}, {&config.StateDir, c.Paths.StateDir}, {&config.CgroupRoot, c.Paths.CgroupRoot},
				{&config.Consul.Address, *address}, {&config.Guard.Default, *guard},
				{&config.Telemetry.Listen, *listen}, {&config.LogLevel, *level},
			} {
				if override.value != "" {
					*override.field = override.value
				}
			}
			return config, nil
		}
		signal.Notify(d.hangup, unix.SIGHUP)
		defer signal.Stop(d.hangup)
		return 0, d.run()
	}
	return c
}

// daemon runs the agent, and another one in its place when the configuration is
// to be read anew: no workload notices an agent that ends or begins.
type daemon struct {
	ctx       context.Context
	version   string
	policyDir string // as in agent.Options
	out       io.Writer
	read      func() (configfile.Config, error)
	changes   *change.Log // of what changed on the node; all agents note in it
	hangup    chan os.Signal
}

// run returns when the context ends, or where not even the first agent can work.
func (d *daemon) run() error {
	config, err := d.read()
	if err != nil {
		return err
	}
	next, err := d.make(config)
	if err != nil {
		return err
	}
	go releaseMemory(d.ctx)
	for {
		running := next
		config := running.config
		next, err = d.runUntilReload(running)
		switch {
		case next == nil && err != nil && running.former != nil && d.ctx.Err() == nil:
			running.log.Error("the agent does not run with the new configuration: it goes on with the former", "error", err)
			if next, err = d.make(*running.former); err != nil {
				return err
			}
		case next == nil:
			return err
		default:
			if err != nil {
				running.log.Error("end the agent of the former configuration", "error", err)
			}
			next.former = &config
		}
	}
}

// instance is one agent with its configuration.
type instance struct {
	*agent.Agent
	config configfile.Config
	log    *slog.Logger
	former *configfile.Config // that it was started in place of; nil: it is the first
}

func (d *daemon) make(config configfile.Config) (*instance, error) {
	log := newLogger(config, d.out)
	made, err := agent.New(config, agent.Options{
		Version:   d.version,
		PolicyDir: d.policyDir,
		Log:       log,
		Changes:   d.changes,
		Notify: func(state string) {
			if state == systemd.SdNotifyStopping && d.ctx.Err() == nil {
				return // another one follows
			}
			_, _ = systemd.SdNotify(false, state) // without a manager there is nobody to tell
		},
		RepairNetworks: func(ctx context.Context) ([]string, error) { return cni.RepairNetworks(ctx, config.StateDir) },
	})
	return &instance{Agent: made, config: config, log: log}, err
}

// runUntilReload runs an agent until it ends by itself, and then there is no next
// one, or until there is another configuration that can be used.
func (d *daemon) runUntilReload(running *instance) (next *instance, err error) {
	ctx, stop := context.WithCancel(d.ctx)
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- running.Run(ctx) }()
	for {
		select {
		case err := <-ended:
			return nil, err
		case <-d.hangup:
			now := systemd.SdNotifyMonotonicUsec() // systemd's Type=notify-reload wants it
			_, _ = systemd.SdNotify(false, systemd.SdNotifyReloading+"\n"+now)
			next, err := d.reload(running.config)
			if err != nil {
				running.log.Error("the configuration was not reloaded: the agent goes on with what it has", "error", err)
				_, _ = systemd.SdNotify(false, systemd.SdNotifyReady)
				continue
			}
			running.log.Info("the configuration is reloaded")
			d.changes.Note(api.Change{Time: time.Now(), Kind: api.ChangeAgent, What: "the configuration is reloaded"})
			stop()
			return next, <-ended
		}
	}
}

// reload makes the agent of the configuration as it is now. Where the data path
// keeps its state does not change under workloads that run.
func (d *daemon) reload(before configfile.Config) (*instance, error) {
	config, err := d.read()
	if err != nil {
		return nil, err
	}
	for _, path := range []struct{ key, was, is string }{
		{"pin_dir", before.PinDir, config.PinDir}, {"state_dir", before.StateDir, config.StateDir}, {"cgroup_root", before.CgroupRoot, config.CgroupRoot},
	} {
		if path.was != path.is {
			return nil, fmt.Errorf("check configuration: %s = %q: it was %q, and a reload cannot change it: drain the node, 'weir unload', and start the agent anew",
				path.key, path.is, path.was)
		}
	}
	return d.make(config)
}

func newLogger(config configfile.Config, out io.Writer) *slog.Logger {
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
