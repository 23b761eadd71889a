// SPDX-License-Identifier: MPL-2.0

package spawn

import (
	"context"
	"fmt"
	"net"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Do calls f on a thread inside the network namespace at path. What f starts
// on other threads is outside of it.
func Do(netns string, f func() error) error {
	result := make(chan error, 1)
	onOwnThread(func() {
		if err := enter(netns); err != nil {
			result <- err
			return
		}
		result <- f()
	})
	return <-result
}

// Dialer returns a DialContext whose sockets are made inside the network
// namespace at path. The address must be numeric.
func Dialer(netns string) func(ctx context.Context, network, address string) (net.Conn, error) {
	return func(ctx context.Context, network, address string) (conn net.Conn, err error) {
		// One numeric address is dialled on the calling thread.
		err = Do(netns, func() error {
			var dialer net.Dialer
			conn, err = dialer.DialContext(ctx, network, address)
			return err
		})
		return conn, err
	}
}

func enter(netns string) error {
	if netns == "" {
		return nil
	}
	file, err := os.Open(netns)
	if err != nil {
		return fmt.Errorf("open namespace: %w", err)
	}
	defer file.Close()
	if err := unix.Setns(int(file.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter namespace %s: %w", netns, err)
	}
	return nil
}

// onOwnThread starts f on a thread that is never given back: it ends with f,
// and with it the namespace that f entered. The main thread does not end with
// a goroutine, and /proc/self would go on to show its namespace, so f never
// gets it.
func onOwnThread(f func()) {
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != unix.Getpid() {
			f()
			return
		}
		locked := make(chan struct{})
		go func() {
			runtime.LockOSThread()
			close(locked)
			f()
		}()
		<-locked // f has another thread for certain
		runtime.UnlockOSThread()
	}()
}
