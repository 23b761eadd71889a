// SPDX-License-Identifier: MPL-2.0

package redirect

import "github.com/weirmesh/weir/redirect/program"

// Preload begins with what an Add of the namespace takes longest for, the
// verifier, while the caller does something else. The result belongs into the
// Attachment, and is closed in any case. An error shows up at the Add. Without a
// processor to spare it is nil: two threads that wait for each other finish later
// than one then.
func (d *Datapath) Preload(netns string) *program.Preloaded {
	if !program.ProcessorToSpare() {
		return nil
	}
	return d.preload(netns)
}

func (d *Datapath) preload(netns string) *program.Preloaded {
	p := &program.Preloaded{Done: make(chan struct{})}
	go func() {
		defer close(p.Done)
		if err := p.Load(d.paths, netns); err != nil {
			p.Drop()
		}
	}()
	return p
}
