// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/test"
)

// scriptFunc is the helper process that does system calls on sockets as it is
// told, one after the other, with nothing of a runtime's dialler in between.
const scriptFunc = "redirect.script"

// step is one system call, or a few that belong together, on one socket.
type step struct {
	Do    string
	On    string // the socket's name in the process
	Addr  netip.AddrPort
	Args  [3]int
	Text  string
	Bytes []byte
	Want  syscall.Errno // what the step must end with
}

// outcome is what a step came to.
type outcome struct {
	Errno   syscall.Errno
	Answer  test.Answer // of ask and names
	Echo    string      // of ask: what the server sent back
	SynData bool        // of ask: data went out with the SYN and was acknowledged
	Value   int         // of original: the length of the answer
}

// scriptPatience bounds a call that blocks. It is only spent where packets are lost.
const scriptPatience = 10 // seconds

// script is a list of steps. Each method returns a longer one and leaves the
// one it was called on as it is.
type script []step

// stream begins a script with a TCP socket of the family.
func stream(domain int) script { return script(nil).open(domain, unix.IPPROTO_TCP) }

func (s script) do(next step) script {
	if len(s) > 0 && next.On == "" {
		next.On = s[len(s)-1].On
	}
	return append(slices.Clip(s), next)
}

func (s script) to(how, addr string) script {
	return s.do(step{Do: how, Addr: netip.MustParseAddrPort(addr)})
}

func (s script) open(domain, protocol int) script {
	return s.do(step{Do: "open", Args: [3]int{domain, protocol}})
}

func (s script) set(level, option, value int) script {
	return s.do(step{Do: "set", Args: [3]int{level, option, value}})
}

// setBytes sets an option to a value that is not a number.
func (s script) setBytes(level, option int, value []byte) script {
	return s.do(step{Do: "setBytes", Args: [3]int{level, option}, Bytes: value})
}

// users sets the real, the effective and the saved UID of the process.
func (s script) users(real, effective, saved int) script {
	return s.do(step{Do: "users", Args: [3]int{real, effective, saved}})
}

func (s script) device(name string) script  { return s.do(step{Do: "device", Text: name}) }
func (s script) bind(addr string) script    { return s.to("bind", addr) }
func (s script) connect(addr string) script { return s.to("connect", addr) }
func (s script) listen() script             { return s.do(step{Do: "listen"}) }
func (s script) disconnect() script         { return s.do(step{Do: "disconnect"}) }
func (s script) names() script              { return s.do(step{Do: "names"}) }

// ask reads the reply of an echo server, and as much more as was sent to it.
func (s script) ask(sent string) script { return s.do(step{Do: "ask", Text: sent}) }

// original asks for SO_ORIGINAL_DST with room for so many bytes.
func (s script) original(level, size int) script {
	return s.do(step{Do: "original", Args: [3]int{level, size}})
}

// accept makes the socket `name` of a connection to the present one.
func (s script) accept(name string) script { return s.do(step{Do: "accept", Text: name}) }

// on says which socket of the process the next steps are about.
func (s script) on(name string) script { return append(slices.Clip(s), step{Do: "nothing", On: name}) }

// fails says what the last step must end with.
func (s script) fails(errno syscall.Errno) script {
	s = slices.Clone(s)
	s[len(s)-1].Want = errno
	return s
}

// data is what the last step sends.
func (s script) data(text string) script {
	s = slices.Clone(s)
	s[len(s)-1].Text = text
	return s
}

func (s step) String() string {
	text := s.Do
	if s.Addr.IsValid() {
		text += " " + s.Addr.String()
	}
	if s.Args != [3]int{} {
		text += fmt.Sprint(" ", s.Args)
	}
	return text + " " + s.Text
}

// actor is a process of an allocation that runs scripts.
type actor struct{ *test.Process }

func (a *alloc) actor(t *testing.T, uid uint32, cgroup *test.Cgroup) actor {
	t.Helper()
	return actor{test.Helper(t, test.Spec{NetNS: a.NetNS, Cgroup: cgroup, UID: uid, GID: uid}, scriptFunc)}
}

// task is an actor that is an application of the allocation.
func (a *alloc) task(t *testing.T) actor { t.Helper(); return a.actor(t, taskUID, a.taskCg) }

// run does the steps and returns their outcomes. A step that ends otherwise
// than it should fails the test.
func (p actor) run(t *testing.T, steps script) []outcome {
	t.Helper()
	var outcomes []outcome
	if err := p.Call(steps, &outcomes); err != nil {
		t.Fatalf("run script: %v", err)
	}
	for i, o := range outcomes {
		if o.Errno != steps[i].Want {
			t.Errorf("step %d, %s: %s, want %s", i+1, steps[i], errnoName(o.Errno), errnoName(steps[i].Want))
		}
	}
	return outcomes
}

// last is the outcome of the last step.
func (p actor) last(t *testing.T, steps script) outcome {
	t.Helper()
	outcomes := p.run(t, steps)
	return outcomes[len(outcomes)-1]
}

func errnoName(errno syscall.Errno) string {
	if errno == 0 {
		return "success"
	}
	return unix.ErrnoName(errno)
}

func serveScripts([]string) error {
	sockets := make(map[string]int)
	return test.Serve(func(steps []step) (outcomes []outcome, err error) {
		for _, s := range steps {
			o, err := runStep(sockets, s)
			if err != nil && !errors.As(err, &o.Errno) {
				return nil, fmt.Errorf("%s: %w", s, err)
			}
			outcomes = append(outcomes, o)
		}
		return outcomes, nil
	})
}

func runStep(sockets map[string]int, s step) (o outcome, err error) {
	fd := sockets[s.On]
	switch s.Do {
	case "nothing":
		return o, nil
	case "open":
		if fd != 0 {
			unix.Close(fd)
		}
		if fd, err = unix.Socket(s.Args[0], unix.SOCK_STREAM|unix.SOCK_CLOEXEC, s.Args[1]); err != nil {
			return o, err
		}
		sockets[s.On] = fd
		limit := unix.Timeval{Sec: scriptPatience}
		return o, errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit))
	case "bind":
		return o, unix.Bind(fd, sockaddr(fd, s.Addr))
	case "listen":
		return o, unix.Listen(fd, max(16, s.Args[0]))
	case "accept":
		accepted, _, err := acceptedBy(fd)
		if err == nil {
			sockets[s.Text] = accepted
		}
		return o, err
	case "set":
		return o, unix.SetsockoptInt(fd, s.Args[0], s.Args[1], s.Args[2])
	case "setBytes":
		return o, unix.SetsockoptString(fd, s.Args[0], s.Args[1], string(s.Bytes))
	case "users":
		return o, unix.Setresuid(s.Args[0], s.Args[1], s.Args[2])
	case "device":
		return o, unix.BindToDevice(fd, s.Text)
	case "connect":
		return o, finishConnect(fd, unix.Connect(fd, sockaddr(fd, s.Addr)), unix.EINTR)
	case "connectLater":
		return o, connectLater(fd, s.Addr)
	case "connectStart": // and no look at what becomes of it
		return o, errors.Join(unix.SetNonblock(fd, true), unix.Connect(fd, sockaddr(fd, s.Addr)))
	case "connectByRing", "connectByWorker", "connectByThread":
		return o, connectByRing(fd, s.Addr, map[string]uint8{"connectByWorker": ringAsync, "connectByThread": ringThread}[s.Do])
	case "connectByData":
		_, err := unix.SendmsgN(fd, []byte(s.Text), nil, sockaddr(fd, s.Addr), unix.MSG_FASTOPEN)
		return o, err
	case "write":
		_, err := unix.Write(fd, []byte(s.Text))
		return o, err
	case "disconnect":
		raw := unix.RawSockaddr{Family: unix.AF_UNSPEC}
		if _, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&raw)), unsafe.Sizeof(raw)); errno != 0 {
			return o, errno
		}
		return o, nil
	case "ask":
		if err := readReply(fd, len(s.Text), &o); err != nil {
			return o, err
		}
		return o, readNames(fd, &o)
	case "names":
		return o, readNames(fd, &o)
	case "original":
		return o, readOriginal(fd, s.Args[0], s.Args[1], &o)
	}
	return o, fmt.Errorf("unknown step %q", s.Do)
}

// connectLater connects as an event loop does: EINPROGRESS, then poll.
func connectLater(fd int, addr netip.AddrPort) error {
	if err := unix.SetNonblock(fd, true); err != nil {
		return err
	}
	if err := finishConnect(fd, unix.Connect(fd, sockaddr(fd, addr)), unix.EINPROGRESS); err != nil {
		return err
	}
	return unix.SetNonblock(fd, false)
}

// finishConnect waits for a connection that ended with `pending`.
func finishConnect(fd int, err error, pending syscall.Errno) error {
	if !errors.Is(err, pending) {
		return err
	}
	ready := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	for {
		n, err := unix.Poll(ready, scriptPatience*1000)
		if err == nil && n == 0 {
			return unix.ETIMEDOUT
		}
		if err != unix.EINTR {
			break
		}
	}
	failure, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && failure != 0 {
		err = syscall.Errno(failure)
	}
	return err
}

// readReply reads what an echo server says, and `more` bytes that it returns.
func readReply(fd, more int, o *outcome) error {
	var line bytes.Buffer
	buffer := make([]byte, 4096)
	for {
		if end := bytes.IndexByte(line.Bytes(), '\n'); end >= 0 && line.Len() >= end+1+more {
			o.Echo = line.String()[end+1:]
			break
		}
		n, err := unix.Read(fd, buffer)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return io.ErrUnexpectedEOF
		}
		line.Write(buffer[:n])
	}
	if info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
		const synData = 32 // TCPI_OPT_SYN_DATA
		o.SynData = info.Options&synData != 0
	}
	return json.NewDecoder(&line).Decode(&o.Answer.Reply)
}

func readNames(fd int, o *outcome) error {
	local, err := unix.Getsockname(fd)
	if err != nil {
		return err
	}
	peer, err := unix.Getpeername(fd)
	if err != nil {
		return err
	}
	o.Answer.From, o.Answer.To = fromSockaddr(local), fromSockaddr(peer)
	return nil
}

func readOriginal(fd, level, size int, o *outcome) error {
	const originalDst = 80 // SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST
	var raw unix.RawSockaddrInet6
	length := uint32(size)
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), originalDst,
		uintptr(unsafe.Pointer(&raw)), uintptr(unsafe.Pointer(&length)), 0)
	if errno != 0 {
		return errno
	}
	o.Value = int(length)
	return nil
}

// sockaddr is the address in the form of the socket's family: IPv4 mapped for
// an IPv6 socket.
func sockaddr(fd int, addr netip.AddrPort) unix.Sockaddr {
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err == nil && domain == unix.AF_INET {
		return &unix.SockaddrInet4{Addr: addr.Addr().As4(), Port: int(addr.Port())}
	}
	return &unix.SockaddrInet6{Addr: addr.Addr().As16(), Port: int(addr.Port())}
}

func fromSockaddr(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	}
	return netip.AddrPort{}
}
