// SPDX-License-Identifier: MPL-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
)

// A relay stands between the agent and Consul on loopback and counts: every
// connection that the agent opens, and every byte that it reads.
type relay struct {
	address  string
	target   string
	listener net.Listener
	running  sync.WaitGroup

	mu     sync.Mutex
	counts relayCounts
	conns  map[net.Conn]bool
}

type relayCounts struct {
	Now    int   // connections that are open
	Most   int   // ... at a time
	Opened int   // ... ever
	Read   int64 // bytes from Consul to the agent
}

func startRelay(target string) (*relay, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("start relay: %w", err)
	}
	r := &relay{address: listener.Addr().String(), target: target, listener: listener, conns: map[net.Conn]bool{}}
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

func (r *relay) carry(agent net.Conn) {
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

func (r *relay) opened(conns ...net.Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, conn := range conns {
		r.conns[conn] = true
	}
	r.counts.Opened++
	r.counts.Now++
	r.counts.Most = max(r.counts.Most, r.counts.Now)
}

func (r *relay) closed(conns ...net.Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, conn := range conns {
		delete(r.conns, conn)
	}
	r.counts.Now--
}

// count is what was seen so far.
func (r *relay) count() relayCounts {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.counts
}

func (r *relay) stop() error {
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
	relay *relay
}

// Write is that of io.Writer.
func (w countingWriter) Write(data []byte) (int, error) {
	n, err := w.conn.Write(data)
	w.relay.mu.Lock()
	w.relay.counts.Read += int64(n)
	w.relay.mu.Unlock()
	return n, err
}
