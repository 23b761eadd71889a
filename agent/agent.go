// SPDX-License-Identifier: MPL-2.0

// Package agent is Weir's daemon: it finds every mesh allocation of the node,
// keeps its ports in sync with Consul, and repairs the data path. Nothing that
// runs depends on it: its exit changes nothing for any workload.
package agent

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/change"
	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/agent/flow"
	"github.com/weirmesh/weir/agent/netwatch"
	"github.com/weirmesh/weir/agent/refusal"
	"github.com/weirmesh/weir/agent/server"
	"github.com/weirmesh/weir/agent/told"
	"github.com/weirmesh/weir/agent/view"
	"github.com/weirmesh/weir/agent/wait"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/reconcile"
	"github.com/weirmesh/weir/redirect/workload"
)

// The agent's rhythm. Changes are seen at once where they can be watched; this
// is for what cannot be, and for what was missed.
const (
	tick          = 2 * time.Second // a look at the links
	resync        = 5 * time.Minute // everything anew
	pruneInterval = 2 * time.Minute // or as soon as one is seen to be gone
	freeInterval  = 30 * time.Second
	checksPerTick = 4   // of few workloads
	fewWorkloads  = 64  // of more it is half of that
	looksPerTick  = 128 // workloads, see lookSome

	moment = 5 * time.Millisecond   // between two passes at least
	storm  = 200 * time.Millisecond // ... where a pass takes long
)

// Options are what the agent has of its process beside the configuration.
type Options struct {
	Log    *slog.Logger
	Notify func(state string) // tells the service manager; may be nil
	// Version of the program, for weir_build_info.
	Version string
	// PolicyDir is where the plugin reads the operator's policy, as the environment says;
	// empty leaves it to the network configuration and its default.
	PolicyDir string
	// RepairNetworks puts back rules and host ports of networks that the plugin
	// built, and says which; nil where that is nobody's task.
	RepairNetworks func(ctx context.Context) (repaired []string, err error)
	// Changes is where the agent notes what changes on the node; nil: a list of its own.
	Changes *change.Log
}

// Agent is the daemon. It is made by New and runs once.
type Agent struct {
	config          configfile.Config
	log             *slog.Logger
	notify          func(string)
	datapath        *redirect.Datapath
	origins         *redirect.IndexReclaimer
	records         *inspect.RecordReader
	consul          *catalog.Watcher // nil: Consul is not to be asked
	docker          *discover.Docker // nil: Docker is not to be asked
	cache           *discover.Cache
	watcher         *discover.Watcher
	networks        *netwatch.Watch
	flows           *flow.Recorder // nil: they are not to be recorded
	changes         *change.Log
	resting         time.Duration // between two runs of origins
	counting        time.Duration // between two looks at the counters of verdicts
	repairNetworks  func(context.Context) ([]string, error)
	version         string
	policyDir       string               // as in Options
	consulApply     prometheus.Histogram // from Consul to the kernel
	networkInterval time.Duration
	wake            chan struct{}
	pins            atomic.Bool // something changed among the pins since the last pass
	arrived         atomic.Bool // an allocation may have come since the last pass
	expects         atomic.Bool // a new allocation waits for its registration

	mu             sync.Mutex // guards what follows against server and metrics
	status         api.Status // what the loop knows; Status adds what others know
	discoveryError string     // why allocations cannot be found; empty: they can
	unreadable     []string   // what of the node could not be read in the last pass
	unseen         told.Unseen
	networkProblem string           // why the networks of workloads are not watched; empty: they are
	foreign        []health.Problem // registrations that do not count, as of the last pass

	server *server.Server

	// The loop's own memory.
	seen        bool     // a pass has found the node's allocations
	awaited     []string // the new allocations that are about to be registered
	spaces      discover.Namespaces
	behind      bool // the data path may be another version's: nobody could look yet
	allocations map[workload.AttachmentID]*allocState
	noticed     time.Time // when Consul's last change was
	broken      string
	managed     []workload.AttachmentID // under Weir as of the last pass, sorted
	tasks       map[string]string       // containers.Tasks as of the last search for tasks of proxies
	nextTurn    int                     // of the round of checks
	nextLook    int                     // of the round of looks
	resynced    time.Time
	pruned      time.Time
	freed       time.Time
	counted     time.Time // the verdicts were
	told        *told.Once
	unmatched   view.Unmatched
	unproven    time.Time // when to look again whether an allocation runs a proxy that is registered for it; zero: all do
	budget      wait.Budget
}

// New checks the configuration. Nothing on the node is touched before Run.
func New(config configfile.Config, options Options) (*Agent, error) {
	if err := config.Validate(); err != nil {
		return nil, err
	}
	a := &Agent{
		config: config, log: options.Log, notify: options.Notify, repairNetworks: options.RepairNetworks, version: options.Version, policyDir: options.PolicyDir, networkInterval: networkInterval,
		datapath:    redirect.New(config.Paths()).Sized(config.Tables.Sizes()).Within(lockTimeout),
		cache:       &discover.Cache{Dir: filepath.Join(config.CNI.CacheDir, "results")},
		resting:     freeInterval,
		counting:    refusal.Interval,
		wake:        make(chan struct{}, 1),
		allocations: make(map[workload.AttachmentID]*allocState),
		unmatched:   make(view.Unmatched),
		told:        told.NewOnce(options.Log),
		budget:      wait.Budget{Least: 50 * time.Millisecond, Most: 2 * time.Second, Together: reconcile.MaxChanges},
		networks:    netwatch.New(),
		consulApply: server.NewConsulApply(),
		changes:     options.Changes,
	}
	if a.changes == nil {
		a.changes = change.NewLog(time.Now())
	}
	a.origins, a.records = a.datapath.NewIndexReclaimer(), a.datapath.NewRecordReader()
	if a.notify == nil {
		a.notify = func(string) {}
	}
	if config.Consul.Enabled {
		consul, err := catalog.NewClient(*config.Consul, catalog.DefaultTimeouts())
		if err != nil {
			return nil, err
		}
		a.consul = catalog.NewWatcher(consul, func() {
			if a.expects.Load() {
				a.allocationArrived()
			}
			a.trigger()
		})
	}
	var err error
	if a.flows, err = flow.New(*config.Flows, a.datapath, a.containers, a.log); err != nil {
		return nil, err
	}
	a.server = server.New(a.shown())
	if config.Docker.Socket != "" {
		a.docker = discover.NewDocker(config.Docker.Socket, a.allocationArrived)
	}
	return a, nil
}

// trigger asks for a pass soon.
func (a *Agent) trigger() {
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

// Run loads or upgrades the data path and then keeps the node as it should be
// until ctx ends. It returns an error only for what it cannot work without.
func (a *Agent) Run(ctx context.Context) error {
	*a.datapath = *a.datapath.Until(ctx) // in place: all that was made of it waits no longer either
	// A plugin adds allocations while the data path is loaded.
	began := time.Now()
	a.mu.Lock()
	a.status.Started = began
	a.mu.Unlock()
	a.changes.Note(api.Change{Time: began, Kind: api.ChangeAgent, What: strings.TrimSpace("the agent began " + a.version)})
	if err := a.load(); err != nil {
		return err
	}
	var err error
	if a.watcher, err = discover.NewWatcher(append(a.config.Paths().Directories(), a.cache.Dir, a.config.CNI.NetNSDir)...); err != nil {
		return err
	}
	a.turned()
	ctx, cancel := context.WithCancel(ctx)
	var background sync.WaitGroup
	if err := a.server.Listen(); err != nil {
		cancel()
		return errors.Join(err, a.watcher.Close())
	}
	a.mu.Lock()
	a.status.Telemetry = a.server.Telemetry()
	a.mu.Unlock()
	a.watchNetworks(&background)
	background.Go(func() {
		a.watcher.Run(func(dir string) {
			if strings.HasPrefix(dir, a.config.PinDir) {
				a.pins.Store(true)
			}
			if dir == a.cache.Dir || dir == a.config.CNI.NetNSDir {
				a.allocationArrived()
			}
			a.trigger()
		})
	})
	if a.consul != nil {
		background.Go(func() { a.consul.Run(ctx) })
	}
	if a.docker != nil {
		background.Go(func() { a.docker.Run(ctx) })
	}
	if a.flows != nil {
		background.Go(func() { a.flows.Run(ctx, a.consul) })
	}
	if a.repairNetworks != nil {
		background.Go(func() { a.keepNetworks(ctx) })
	}
	a.loop(ctx)
	cancel()
	a.closeGates(func(workload.AttachmentID) bool { return false })
	a.notify("STOPPING=1")
	err = errors.Join(a.watcher.Close(), a.networks.Close(), a.server.Close())
	background.Wait()
	return err
}

// loop observes, compares, applies, waits.
func (a *Agent) loop(ctx context.Context) {
	clock, search := time.NewTicker(tick), time.NewTimer(tick)
	defer clock.Stop()
	defer search.Stop()
	a.pass(true)
	a.notify("READY=1")
	a.log.Info("ready", "consul", a.config.Consul.Address, "guard", a.config.Guard.Default)
	for {
		select {
		case <-ctx.Done():
			return
		case <-a.wake:
			began := time.Now()
			a.pass(true)
			rest := wait.Between(time.Since(began), moment, storm)
			if a.cache.Halfway || a.budget.Left() > 0 {
				rest = moment // the pass has asked for another
			}
			if _, alive := wait.Pause(ctx, rest, nil); !alive {
				return
			}
		case <-clock.C:
			a.pass(false)
		case <-a.networks.Changed():
			a.checkMoved()
		case <-search.C:
		}
		search.Reset(min(a.identifyProxies(time.Now()), a.untilProven(time.Now()), a.lookAtGates(time.Now())))
		a.notify("WATCHDOG=1")
	}
}

// pass is one turn of the loop. changed says that something is known to have
// changed; without it, only what is cheap or due is looked at.
func (a *Agent) pass(changed bool) {
	fresh, err := a.watcher.Ensure()
	if err != nil {
		a.warnOnce("watch directories", err)
	}
	a.server.KeepSocket()
	now := time.Now()
	if !a.repair() {
		a.noteProblems(now)
		a.turned() // nothing can be changed now, and all of it would wait in vain
		return
	}
	if a.pins.Swap(false) {
		a.checkUnhooked()
	}
	// Before a prune, so that a namespace that was replaced is taken over first.
	prunes := now.Sub(a.pruned) > pruneInterval
	if changed || fresh || prunes || now.Sub(a.resynced) > resync || a.retryDue(now) {
		if now.Sub(a.resynced) > resync {
			for _, m := range a.allocations {
				m.place.Forget()
			}
			a.resynced = now
		}
		a.reconcile(now)
	}
	if prunes {
		a.pruned = now
		a.prune()
	}
	if now.Sub(a.freed) > a.resting {
		a.freed = now
		a.free()
	}
	if now.Sub(a.counted) >= a.counting {
		a.counted = now
		a.readRefusals(now)
	}
	if !changed {
		a.checkSome()
		a.lookSome(time.Now())
	}
	a.noteProblems(now)
	a.turned()
}

// turned notes that the loop lives.
func (a *Agent) turned() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.status.Alive = time.Now()
}

// prune forgets namespaces that died.
func (a *Agent) prune() {
	removed, err := a.datapath.PruneDeadOf(a.records)
	a.count(func(c *api.Counts) { c.Pruned += uint64(len(removed)) })
	for _, key := range removed {
		a.log.Info("workload removed: its namespace is gone", "alloc_id", key.ContainerID, "interface", key.IfName)
	}
	if err != nil {
		a.warnOnce("remove dead namespaces", err)
	}
}

// free gives back the indexes of origins that nobody uses any more.
func (a *Agent) free() {
	freed, err := a.origins.Run()
	a.count(func(c *api.Counts) { c.Freed += uint64(freed) })
	if err != nil {
		a.warnOnce("give back origins", err)
	}
}

func (a *Agent) count(add func(*api.Counts)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	add(&a.status.Counts)
}

// warnOnce tells of an error that the next pass may not have.
func (a *Agent) warnOnce(what string, err error) {
	a.count(func(c *api.Counts) { c.Failures++ })
	a.log.Error(what, "error", err)
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
