// SPDX-License-Identifier: MPL-2.0

// Package reconcile brings the rows, listeners, routes and programs of workloads to
// what their records say. It is the one way to a redirected namespace.
package reconcile

import (
	"context"
	"runtime"
	"time"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/program/filter"
	"github.com/weirmesh/weir/redirect/store"
)

// Reconciler brings the rows, listeners, routes and programs of workloads to what their
// records say.
type Reconciler struct {
	inspect.Reader

	Context      context.Context // of who waits for the lock; what has begun is finished without it
	LockTimeout  time.Duration   // how long a change waits for the lock
	CheckTimeout time.Duration   // ... and a check
	Wait         func()          // until no program reads rows that were replaced before
	Processors   int             // workloads that are completed at a time

	processes *host.Processes
	filtering chan struct{} // holds one for each filter that is being set
	filters   *filter.Setter
	families  *program.Families
}

// Of returns the reconciler of what the reader reads.
func Of(reader inspect.Reader) Reconciler {
	processors := runtime.GOMAXPROCS(0)
	return Reconciler{Reader: reader, Context: context.Background(), LockTimeout: store.LockTimeout, CheckTimeout: store.CheckTimeout, Wait: bpfmap.WaitForReaders, Processors: processors, processes: new(host.Processes), filtering: make(chan struct{}, processors), filters: filter.NewSetter(), families: program.NewFamilies()}
}

// Locked runs action while no other process changes the state.
func (d *Reconciler) Locked(action func() error) error {
	return store.LockedWithin(d.Context, d.Paths().Lock(), d.LockTimeout, action)
}
