// SPDX-License-Identifier: MPL-2.0

package redirect

// Preload begins with what an Add of the namespace takes longest for, the
// verifier, while the caller does something else. The result belongs into the
// Attachment, and is closed in any case. An error shows up at the Add. Without a
// processor to spare it is nil: two threads that wait for each other finish later
// than one then.
func (d *Datapath) Preload(netns string) *Preloaded {
	if !processorToSpare() {
		return nil
	}
	return d.preload(netns)
}

func (d *Datapath) preload(netns string) *Preloaded {
	p := &Preloaded{done: make(chan struct{})}
	go func() {
		defer close(p.done)
		if err := p.load(d.paths, netns); err != nil {
			p.drop()
		}
	}()
	return p
}
