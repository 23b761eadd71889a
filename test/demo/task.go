// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// report is what the client task prints: what it saw of its connection.
type report struct {
	Dialled string         `json:"dialled"`
	Peer    netip.AddrPort `json:"peer"`  // getpeername(2)
	Local   netip.AddrPort `json:"local"` // getsockname(2)
	Status  string         `json:"status,omitempty"`
	Body    string         `json:"body,omitempty"`
	Error   string         `json:"error,omitempty"`
	Refused bool           `json:"refused,omitempty"` // the error is ECONNREFUSED
}

// serve is the task of the one allocation: a plain HTTP service on loopback
// that knows nothing of a mesh. It says "ready" once it listens.
func serve(address string) error {
	listener, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp4", address)
	if err != nil {
		return fmt.Errorf("serve: %w", err)
	}
	fmt.Println("ready")
	server := &http.Server{
		ReadHeaderTimeout: 5 * time.Second,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "hello from uid %d, served on %s", os.Getuid(), address)
		}),
	}
	return server.Serve(listener)
}

// get is the task of the other allocation: a plain HTTP client.
func get(url string) error {
	r := fetch(url)
	return json.NewEncoder(os.Stdout).Encode(r)
}

func fetch(url string) report {
	r := report{Dialled: url}
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
			if err != nil {
				return nil, err
			}
			if r.Peer, r.Local, err = names(conn); err != nil {
				return nil, errors.Join(err, conn.Close())
			}
			return conn, nil
		},
	}
	response, err := (&http.Client{Transport: transport, Timeout: 10 * time.Second}).Get(url)
	if err != nil {
		r.Error, r.Refused = err.Error(), errors.Is(err, syscall.ECONNREFUSED)
		return r
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		r.Error = err.Error()
	}
	r.Status, r.Body = response.Status, string(body)
	return r
}

// names asks the kernel itself for both ends of a connection.
func names(conn net.Conn) (peer, local netip.AddrPort, err error) {
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		return peer, local, fmt.Errorf("get socket: %w", err)
	}
	var peerErr, localErr error
	err = raw.Control(func(fd uintptr) {
		var address unix.Sockaddr
		address, peerErr = unix.Getpeername(int(fd))
		peer = addrPort(address)
		address, localErr = unix.Getsockname(int(fd))
		local = addrPort(address)
	})
	return peer, local, errors.Join(err, peerErr, localErr)
}

func addrPort(address unix.Sockaddr) netip.AddrPort {
	switch a := address.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr), uint16(a.Port))
	}
	return netip.AddrPort{}
}
