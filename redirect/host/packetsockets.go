// SPDX-License-Identifier: MPL-2.0

package host

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
)

// PacketSocket is a socket that sees and sends frames of a device.
type PacketSocket struct {
	UID   uint32 // of whoever made it
	Inode uint32
}

// PacketSockets returns the packet sockets of the namespace. It reads /proc: the part of
// sock_diag for them is a module that a kernel may not have.
func (ns *Namespace) PacketSockets() (found []PacketSocket, err error) {
	err = ns.Do(func() (err error) {
		found, err = readPacketSockets("/proc/thread-self/net/packet")
		return err
	})
	return found, err
}

// readPacketSockets reads the table as the kernel writes it: a heading, then lines of
// "sk RefCnt Type Proto Iface R Rmem User Inode".
func readPacketSockets(path string) (found []PacketSocket, err error) {
	file, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // a kernel without such sockets
	}
	if err != nil {
		return nil, fmt.Errorf("list packet sockets: %w", err)
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	lines.Scan() // the heading
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 9 {
			return nil, fmt.Errorf("list packet sockets: line %q has too few fields", lines.Text())
		}
		uid, uidErr := strconv.ParseUint(fields[7], 10, 32)
		inode, inodeErr := strconv.ParseUint(fields[8], 10, 32)
		if err := errors.Join(uidErr, inodeErr); err != nil {
			return nil, fmt.Errorf("list packet sockets: %w", err)
		}
		found = append(found, PacketSocket{UID: uint32(uid), Inode: uint32(inode)})
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("list packet sockets: %w", err)
	}
	return found, nil
}
