// SPDX-License-Identifier: MPL-2.0

// Package limit redirects one namespace with the least that could: the hooks of
// Weir with constants in place of its tables. No redirection by these hooks can
// cost less.
package limit

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

//go:generate go tool bpf2go -go-package limit -target bpfel -cc clang -strip llvm-strip -output-stem limit -no-global-types Limit bpf/limit.c -- -O2 -g -mcpu=v3 -Wall -Werror -I/usr/include/x86_64-linux-gnu -I/usr/include/aarch64-linux-gnu

// A Config is all that the programs know.
type Config struct {
	Cgroup   string // the root, where everybody's sockets meet the programs
	NetNS    string
	Cookie   uint64     // of NetNS
	Remote   netip.Addr // what tasks dial
	Service  netip.Addr // what the outside dials
	Encoded  netip.Addr // what Remote is rewritten to; the namespace routes it to lo
	Port     uint16     // of Remote and Service
	Outbound uint16     // the proxy's listeners
	Inbound  uint16

	objects LimitObjects
	opened  []link.Link
}

// Attach loads the programs and attaches them, those of the cgroup at its root.
func (c *Config) Attach() (err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Close())
		}
	}()
	spec, err := LoadLimit()
	if err != nil {
		return fmt.Errorf("read programs: %w", err)
	}
	for name, value := range map[string]any{
		"cookie": c.Cookie, "remote": word(c.Remote), "service": word(c.Service), "encoded": word(c.Encoded),
		"port":          binary.LittleEndian.Uint16(binary.BigEndian.AppendUint16(nil, c.Port)),
		"outbound_port": uint32(c.Outbound), "inbound_port": uint32(c.Inbound),
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	if err := spec.LoadAndAssign(&c.objects, nil); err != nil {
		return fmt.Errorf("load programs: %w", err)
	}
	for _, program := range []struct {
		*ebpf.Program
		at ebpf.AttachType
	}{
		{c.objects.LimitConnect4, ebpf.AttachCGroupInet4Connect},
		{c.objects.LimitSockops, ebpf.AttachCGroupSockOps},
		{c.objects.LimitGetsockopt, ebpf.AttachCGroupGetsockopt},
	} {
		if err := c.attach(program.Program, program.at); err != nil {
			return err
		}
	}
	network, err := os.Open(c.NetNS)
	if err != nil {
		return err
	}
	defer network.Close()
	attached, err := link.AttachNetNs(int(network.Fd()), c.objects.LimitLookup)
	if err != nil {
		return fmt.Errorf("attach sk_lookup to %s: %w", c.NetNS, err)
	}
	c.opened = append(c.opened, attached)
	return nil
}

// attach attaches a program to the cgroup.
func (c *Config) attach(program *ebpf.Program, at ebpf.AttachType) error {
	attached, err := link.AttachCgroup(link.CgroupOptions{Path: c.Cgroup, Attach: at, Program: program})
	if err != nil {
		return fmt.Errorf("attach %s to %s: %w", at, c.Cgroup, err)
	}
	c.opened = append(c.opened, attached)
	return nil
}

// Close detaches everything.
func (c *Config) Close() error {
	var errs []error
	for _, attached := range c.opened {
		errs = append(errs, attached.Close())
	}
	c.opened = nil
	return errors.Join(append(errs, c.objects.Close())...)
}

// word is an IPv4 address as the programs see it.
func word(addr netip.Addr) uint32 {
	bytes := addr.As4()
	return binary.LittleEndian.Uint32(bytes[:])
}
