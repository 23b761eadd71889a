// SPDX-License-Identifier: MPL-2.0

// Package relay counts what goes between an agent and its Consul.
package relay

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
)

// A Relay stands between the agent and Consul on loopback and counts: every
// connection that the agent opens, and every byte that it reads.
type Relay struct {
	Address  string
	target   string
	listener net.Listener
	running  sync.WaitGroup

	mu     sync.Mutex
	counts Counts
	conns  map[net.Conn]bool
}

type Counts struct {
	Now    int   // connections that are open
	Most   int   // ... at a time
	Opened int   // ... ever
	Read   int64 // bytes from Consul to the agent
}

// Start listens on loopback for the agent.
func Start(target string) (*Relay, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("start relay: %w", err)
	}
	r := &Relay{Address: listener.Addr().String(), target: target, listener: listener, conns: map[net.Conn]bool{}}
	r.running.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return // closed
			}
			r.running.Go(func() { r.carry(conn) })
		}
	})
	return r, nil
}

func (r *Relay) carry(agent net.Conn) {
	defer agent.Close()
	consul, err := net.Dial("tcp", r.target)
	if err != nil {
		return
	}
	defer consul.Close()
	r.opened(agent, consul)
	defer r.closed(agent, consul)
	r.running.Go(func() {
		// Either end that closes ends both: HTTP has no half-closed requests.
		_, _ = io.Copy(consul, agent)
		consul.Close()
	})
	_, _ = io.Copy(countingWriter{agent, r}, consul)
}

func (r *Relay) opened(conns ...net.Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, conn := range conns {
		r.conns[conn] = true
	}
	r.counts.Opened++
	r.counts.Now++
	r.counts.Most = max(r.counts.Most, r.counts.Now)
}

func (r *Relay) closed(conns ...net.Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, conn := range conns {
		delete(r.conns, conn)
	}
	r.counts.Now--
}

// Count is what was seen so far.
func (r *Relay) Count() Counts {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.counts
}

// Stop closes the listener and all connections, and waits for them.
func (r *Relay) Stop() error {
	err := r.listener.Close()
	r.mu.Lock()
	for conn := range r.conns {
		if closing := conn.Close(); !errors.Is(closing, net.ErrClosed) {
			err = errors.Join(err, closing)
		}
	}
	r.mu.Unlock()
	r.running.Wait()
	return err
}

// countingWriter counts when bytes arrive, not when their connection ends.
type countingWriter struct {
	conn  net.Conn
	relay *Relay
}

// Write is that of io.Writer.
func (w countingWriter) Write(data []byte) (int, error) {
	n, err := w.conn.Write(data)
	w.relay.mu.Lock()
	w.relay.counts.Read += int64(n)
	w.relay.mu.Unlock()
	return n, err
}
