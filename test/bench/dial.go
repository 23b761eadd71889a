// SPDX-License-Identifier: MPL-2.0

package main

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// The tasks of a client.
const (
	taskConnect  = "connect"  // Count times on each thread: connect, 1 byte there and back, close
	taskChurn    = "churn"    // the same, with the rate of each block of Block connections
	taskStream   = "stream"   // writes of Size bytes for Duration
	taskRequests = "requests" // Size bytes there and back on Conns connections for Duration
	taskCalls    = "calls"    // getsockopt, setsockopt and getpeername, Count times each, on one connection
)

// A dialSpec tells a worker to be a client.
type dialSpec struct {
	Task     string
	To       netip.AddrPort
	Threads  int
	Count    int
	Warmup   int // connections before the measurement
	Block    int
	Size     int
	Conns    int
	Duration time.Duration // requests and stream: how long; churn: when to give up
}

// A dialReport is what a client measured. Which fields are set depends on the task.
type dialReport struct {
	CPU      time.Duration
	Elapsed  time.Duration
	Done     int                // connections or requests
	Bytes    uint64             // that the server received
	P50, P99 time.Duration      // of connect()
	Rates    []float64          // churn: connections per second, block by block
	Calls    map[string]float64 // calls: nanoseconds of one, by name
}

// dial warms up, says so on out, and measures once control has sent a line.
func dial(spec dialSpec, control io.Reader, out io.Writer) error {
	runtime.LockOSThread()
	to := sockaddr(spec.To)
	one := make([]byte, 1)
	for range spec.Warmup {
		if _, err := connectOnce(to, one); err != nil {
			return fmt.Errorf("warm up: %w", err)
		}
	}
	answers := json.NewEncoder(out)
	if err := answers.Encode(dialReport{}); err != nil {
		return err
	}
	if _, err := bufio.NewReader(control).ReadByte(); err != nil {
		return err
	}
	before, err := cpuTime()
	if err != nil {
		return err
	}
	start := time.Now()
	var report dialReport
	switch spec.Task {
	case taskConnect:
		report, err = connectMany(spec, to)
	case taskChurn:
		report, err = churn(spec, to)
	case taskStream:
		report, err = stream(spec, to)
	case taskRequests:
		report, err = requests(spec, to)
	case taskCalls:
		report, err = calls(spec, to)
	default:
		err = errors.New("no such task")
	}
	if err != nil {
		return fmt.Errorf("%s to %s: %w", spec.Task, spec.To, err)
	}
	if report.Elapsed == 0 {
		report.Elapsed = time.Since(start)
	}
	after, err := cpuTime()
	if err != nil {
		return err
	}
	report.CPU = after - before
	return answers.Encode(report)
}

// connectOnce is the measured connection; the time is connect's alone.
func connectOnce(to *unix.RawSockaddrInet4, one []byte) (time.Duration, error) {
	fd, err := tcpSocket(0)
	if err != nil {
		return 0, err
	}
	defer closeFD(fd)
	start := time.Now()
	if err := connectTo(fd, to); err != nil {
		return 0, err
	}
	took := time.Since(start)
	if err := writeAll(fd, one); err != nil {
		return 0, err
	}
	return took, readAll(fd, one)
}

func connectMany(spec dialSpec, to *unix.RawSockaddrInet4) (dialReport, error) {
	threads := max(spec.Threads, 1)
	times := make([]time.Duration, threads*spec.Count)
	errs := make([]error, threads)
	start := time.Now()
	var group sync.WaitGroup
	for thread := range threads {
		group.Go(func() {
			runtime.LockOSThread()
			one := make([]byte, 1)
			for i := range spec.Count {
				took, err := connectOnce(to, one)
				if err != nil {
					errs[thread] = err
					return
				}
				times[thread*spec.Count+i] = took
			}
		})
	}
	group.Wait()
	report := dialReport{Done: len(times), Elapsed: time.Since(start)}
	slices.Sort(times)
	report.P50, report.P99 = times[len(times)/2], times[len(times)*99/100]
	return report, errors.Join(errs...)
}

// churn gives up after Duration; the last rate is then that of an unfinished
// block. A connection for which no local port is free is no connection, but
// the time it took counts.
func churn(spec dialSpec, to *unix.RawSockaddrInet4) (dialReport, error) {
	var report dialReport
	one := make([]byte, 1)
	start := time.Now()
	for report.Done < spec.Count && time.Since(start) < spec.Duration {
		block, done := time.Now(), 0
		for done < spec.Block && time.Since(start) < spec.Duration {
			_, err := connectOnce(to, one)
			if errors.Is(err, unix.EADDRNOTAVAIL) {
				continue
			}
			if err != nil {
				return report, err
			}
			done++
		}
		report.Done += done
		report.Rates = append(report.Rates, float64(done)/time.Since(block).Seconds())
	}
	return report, nil
}

func stream(spec dialSpec, to *unix.RawSockaddrInet4) (dialReport, error) {
	fd, err := tcpSocket(0)
	if err != nil {
		return dialReport{}, err
	}
	defer closeFD(fd)
	if err := connectTo(fd, to); err != nil {
		return dialReport{}, err
	}
	block := make([]byte, spec.Size)
	var sent uint64
	start := time.Now()
	for time.Since(start) < spec.Duration {
		if err := writeAll(fd, block); err != nil {
			return dialReport{}, err
		}
		sent += uint64(len(block))
	}
	if err := unix.Shutdown(fd, unix.SHUT_WR); err != nil {
		return dialReport{}, err
	}
	count := make([]byte, 8)
	if err := readAll(fd, count); err != nil {
		return dialReport{}, fmt.Errorf("read the server's count: %w", err)
	}
	report := dialReport{Bytes: binary.LittleEndian.Uint64(count), Elapsed: time.Since(start)}
	if report.Bytes != sent {
		return report, fmt.Errorf("sent %d bytes, the server received %d", sent, report.Bytes)
	}
	return report, nil
}

// requests keeps one request in flight on each connection.
func requests(spec dialSpec, to *unix.RawSockaddrInet4) (dialReport, error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return dialReport{}, err
	}
	defer closeFD(epoll)
	message, answer := make([]byte, spec.Size), make([]byte, spec.Size)
	missing := map[int]int{} // connection: bytes of its answer still to come
	for range spec.Conns {
		fd, err := tcpSocket(0)
		if err != nil {
			return dialReport{}, err
		}
		defer closeFD(fd)
		if err := errors.Join(connectTo(fd, to), setNoDelay(fd), watch(epoll, fd)); err != nil {
			return dialReport{}, err
		}
		missing[fd] = spec.Size
	}
	var report dialReport
	start := time.Now()
	for fd := range missing {
		if err := writeAll(fd, message); err != nil {
			return report, err
		}
	}
	events := make([]unix.EpollEvent, 64)
	for time.Since(start) < spec.Duration {
		ready, err := waitFor(epoll, events)
		if err != nil {
			return report, err
		}
		for _, event := range ready {
			fd := int(event.Fd)
			n, err := readFD(fd, answer[:missing[fd]])
			if err != nil || n == 0 {
				return report, errors.Join(io.ErrUnexpectedEOF, err)
			}
			if missing[fd] -= n; missing[fd] > 0 {
				continue
			}
			report.Done++
			missing[fd] = spec.Size
			if err := writeAll(fd, message); err != nil {
				return report, err
			}
		}
	}
	report.Elapsed = time.Since(start)
	return report, nil
}

func calls(spec dialSpec, to *unix.RawSockaddrInet4) (dialReport, error) {
	fd, err := tcpSocket(0)
	if err != nil {
		return dialReport{}, err
	}
	defer closeFD(fd)
	if err := connectTo(fd, to); err != nil {
		return dialReport{}, err
	}
	report := dialReport{Calls: make(map[string]float64)}
	var peer unix.RawSockaddrInet4
	for name, call := range map[string]func() error{
		"getsockopt":  func() error { return socketError(fd) },
		"setsockopt":  func() error { return setNoDelay(fd) },
		"getpeername": func() error { return peerName(fd, &peer) },
	} {
		start := time.Now()
		for range spec.Count {
			if err := call(); err != nil {
				return report, fmt.Errorf("%s: %w", name, err)
			}
		}
		report.Calls[name] = float64(time.Since(start).Nanoseconds()) / float64(spec.Count)
	}
	if got := nameOf(&peer); got != spec.To {
		return report, fmt.Errorf("getpeername: got %s", got)
	}
	return report, nil
}
