// SPDX-License-Identifier: MPL-2.0

// Package reconcile brings the rows, listeners, routes and programs of workloads to
// what their records say. It is the one way to a redirected namespace.
package reconcile

import (
	"context"
	"time"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/program"
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

	processes *host.Processes
	families  *program.Families
}

// Of returns the reconciler of what the reader reads.
func Of(reader inspect.Reader) Reconciler {
	return Reconciler{Reader: reader, Context: context.Background(), LockTimeout: store.LockTimeout, CheckTimeout: store.CheckTimeout, Wait: bpfmap.WaitForReaders, processes: new(host.Processes), families: program.NewFamilies()}
}

// Locked runs action while no other process changes the state.
func (d *Reconciler) Locked(action func() error) error {
	return store.LockedWithin(d.Context, d.Paths().Lock(), d.LockTimeout, action)
}
