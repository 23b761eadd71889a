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

// Served returns the ports of the namespace at path on which somebody listens over
// TCP, and those to which a UDP socket without a peer is bound. The loopback
// addresses count as the others do.
func Served(path string) (tcp, udp map[uint16]bool, err error) {
	ns, err := OpenNamespace(path)
	if err != nil {
		return nil, nil, err
	}
	defer ns.Close()
	tcp, udp = make(map[uint16]bool), make(map[uint16]bool)
	listeners, err := ns.Listening()
	if err != nil {
		return nil, nil, err
	}
	for _, s := range listeners {
		tcp[s.Port] = true
	}
	err = ns.Do(func() error {
		// Not sock_diag, whose part for UDP is a module that a kernel may not have.
		return errors.Join(boundUDP("/proc/thread-self/net/udp", udp), boundUDP("/proc/thread-self/net/udp6", udp))
	})
	return tcp, udp, err
}

// boundUDP reads a table of UDP sockets as the kernel writes it:
// "sl local_address rem_address ...", each address HEX:PORT.
func boundUDP(path string, ports map[uint16]bool) error {
	file, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // a kernel without IPv6
	}
	if err != nil {
		return fmt.Errorf("list UDP sockets: %w", err)
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	lines.Scan() // the heading
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 3 || !strings.HasSuffix(fields[2], ":0000") {
			continue // it has a peer, and hears nobody else
		}
		_, text, _ := strings.Cut(fields[1], ":")
		port, err := strconv.ParseUint(text, 16, 16)
		if err != nil {
			return fmt.Errorf("list UDP sockets: %w", err)
		}
		ports[uint16(port)] = true
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("list UDP sockets: %w", err)
	}
	return nil
}
