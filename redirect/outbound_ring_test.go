// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"net/netip"
	"runtime"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What of the kernel's io_uring interface a single connect needs.
const (
	ringOffsetRings = 0          // IORING_OFF_SQ_RING; both rings with IORING_FEAT_SINGLE_MMAP
	ringOffsetSQEs  = 0x10000000 // IORING_OFF_SQES
	ringOpConnect   = 16         // IORING_OP_CONNECT
	ringAsync       = 1 << 4     // IOSQE_ASYNC: a worker does it, not the caller
	ringThread      = 1 << 1     // IORING_SETUP_SQPOLL: a thread of the kernel takes it, no call
	ringGetEvents   = 1          // IORING_ENTER_GETEVENTS
	ringWakeUp      = 1 << 1     // IORING_ENTER_SQ_WAKEUP
	ringEntries     = 1
	ringSubmission  = 64 // bytes of an io_uring_sqe
	ringCompletion  = 16 // bytes of an io_uring_cqe
)

// ringParams is struct io_uring_params.
type ringParams struct {
	SQEntries, CQEntries, Flags, ThreadCPU, ThreadIdle, Features, WQFd uint32
	_                                                                  [3]uint32
	SQ                                                                 struct{ Head, Tail, Mask, Entries, Flags, Dropped, Array, _, _, _ uint32 }
	CQ                                                                 struct{ Head, Tail, Mask, Entries, Overflow, CQEs, Flags, _, _, _ uint32 }
}

// ringEntry is the part of struct io_uring_sqe that a connect uses.
type ringEntry struct {
	Opcode, Flags uint8
	Priority      uint16
	FD            int32
	Offset        uint64 // length of the address
	Address       uint64
	_             [40]byte
}

// connectByRing connects by io_uring: how is 0, ringAsync or ringThread.
func connectByRing(fd int, addr netip.AddrPort, how uint8) (err error) {
	params := ringParams{Flags: uint32(how & ringThread), ThreadIdle: 1000}
	ring, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, ringEntries, uintptr(unsafe.Pointer(&params)), 0)
	if errno != 0 {
		return errno
	}
	defer unix.Close(int(ring))
	size := max(params.SQ.Array+4*params.SQEntries, params.CQ.CQEs+ringCompletion*params.CQEntries)
	rings, err := unix.Mmap(int(ring), ringOffsetRings, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unix.Munmap(rings)) }()
	entries, err := unix.Mmap(int(ring), ringOffsetSQEs, ringSubmission*int(params.SQEntries), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unix.Munmap(entries)) }()
	word := func(offset uint32) *uint32 { return (*uint32)(unsafe.Pointer(&rings[offset])) }

	raw, length := ringSockaddr(fd, addr)
	entry := (*ringEntry)(unsafe.Pointer(&entries[0]))
	*entry = ringEntry{Opcode: ringOpConnect, FD: int32(fd), Offset: uint64(length), Address: uint64(uintptr(unsafe.Pointer(raw)))}
	entry.Flags = how & ringAsync
	flags := uintptr(ringGetEvents)
	if how == ringThread {
		flags |= ringWakeUp
	}
	*word(params.SQ.Array) = 0
	atomic.StoreUint32(word(params.SQ.Tail), 1)
	for atomic.LoadUint32(word(params.CQ.Tail)) == 0 {
		submit := 1 - atomic.LoadUint32(word(params.SQ.Head))
		_, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, ring, uintptr(submit), 1, flags, 0, 0)
		if errno != 0 && !errors.Is(errno, unix.EINTR) {
			return errno
		}
	}
	runtime.KeepAlive(raw)
	if result := *(*int32)(unsafe.Pointer(&rings[params.CQ.CQEs+8])); result < 0 {
		return syscall.Errno(-result)
	}
	return nil
}

func ringSockaddr(fd int, addr netip.AddrPort) (*unix.RawSockaddrInet6, int) {
	raw := &unix.RawSockaddrInet6{}
	port := (*[2]byte)(unsafe.Pointer(&raw.Port)) // at the same place in both families
	port[0], port[1] = byte(addr.Port()>>8), byte(addr.Port())
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err == nil && domain == unix.AF_INET {
		raw4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(raw))
		raw4.Family, raw4.Addr = unix.AF_INET, addr.Addr().As4()
		return raw, unix.SizeofSockaddrInet4
	}
	raw.Family, raw.Addr = unix.AF_INET6, addr.Addr().As16()
	return raw, unix.SizeofSockaddrInet6
}
