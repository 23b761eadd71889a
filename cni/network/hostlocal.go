// SPDX-License-Identifier: MPL-2.0

package network

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/plugins/plugins/ipam/host-local/backend/allocator"
	"github.com/containernetworking/plugins/plugins/ipam/host-local/backend/disk"
)

// This file is the reference plugin host-local without its process, which took a
// sixth of an ADD: its own packages, its files, its lock. Whether it or this took
// a lease cannot be told, and each gives back what the other took.

// withLeases opens the leases of a configuration, under the lock of host-local.
func (r *record) withLeases(stdin []byte, action func(*allocator.IPAMConfig, *disk.Store) error) (err error) {
	conf, _, err := allocator.LoadIPAMConfig(stdin, plainArgs(r.Args))
	if err != nil {
		return err
	}
	leases, err := disk.New(conf.Name, conf.DataDir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, leases.Close()) }()
	return action(conf, leases)
}

// take takes an address of each set of ranges, or none at all.
func (r *record) take(stdin []byte) (types.Result, error) {
	result := &current.Result{CNIVersion: current.ImplementedSpecVersion}
	err := r.withLeases(stdin, func(conf *allocator.IPAMConfig, leases *disk.Store) (err error) {
		if conf.ResolvConf != "" {
			if result.DNS, err = readResolvConf(conf.ResolvConf); err != nil {
				return err
			}
		}
		asked := make(map[string]net.IP)
		for _, ip := range conf.IPArgs {
			asked[ip.String()] = ip
		}
		for i := range conf.Ranges {
			ip, err := allocator.NewIPAllocator(&conf.Ranges[i], leases, i).Get(r.Key.ContainerID, r.Key.IfName, claim(asked, &conf.Ranges[i]))
			if err != nil {
				if strings.Contains(err.Error(), "no IP addresses available") { // the package has no better sign
					err = fmt.Errorf("%w: %s has each lease as a file: take a larger subnet, or remove what no allocation holds", err, filepath.Join(r.LeaseDir, conf.Name))
				}
				return errors.Join(fmt.Errorf("range %d: %w", i, err), r.giveBack(conf, leases, i))
			}
			result.IPs = append(result.IPs, ip)
		}
		for _, ip := range asked {
			return errors.Join(fmt.Errorf("address %s was asked for and is in no range", ip), r.giveBack(conf, leases, len(conf.Ranges)))
		}
		result.Routes = conf.Routes
		return nil
	})
	return result, err
}

// claim takes the address out of asked that lies in the ranges; nil where none does.
func claim(asked map[string]net.IP, ranges *allocator.RangeSet) net.IP {
	for name, ip := range asked {
		if ranges.Contains(ip) {
			delete(asked, name)
			return ip
		}
	}
	return nil
}

// giveBack gives back the addresses of the first sets of ranges.
func (r *record) giveBack(conf *allocator.IPAMConfig, leases *disk.Store, count int) error {
	var problems []error
	for i := range conf.Ranges[:count] {
		problems = append(problems, allocator.NewIPAllocator(&conf.Ranges[i], leases, i).Release(r.Key.ContainerID, r.Key.IfName))
	}
	return errors.Join(problems...)
}

func readResolvConf(path string) (dns types.DNS, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return dns, err
	}
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		switch fields[0] {
		case "nameserver":
			dns.Nameservers = append(dns.Nameservers, fields[1])
		case "domain":
			dns.Domain = fields[1]
		case "search":
			dns.Search = append(dns.Search, fields[1:]...)
		case "options":
			dns.Options = append(dns.Options, fields[1:]...)
		}
	}
	return dns, nil
}

// hostLocal does what host-local does at a command.
func (r *record) hostLocal(command string, stdin []byte) (result types.Result, err error) {
	switch command {
	case "ADD":
		result, err = r.take(stdin)
	case "DEL":
		err = r.withLeases(stdin, func(conf *allocator.IPAMConfig, leases *disk.Store) error {
			return r.giveBack(conf, leases, len(conf.Ranges))
		})
	case "CHECK":
		err = r.withLeases(stdin, func(_ *allocator.IPAMConfig, leases *disk.Store) error {
			if !leases.FindByID(r.Key.ContainerID, r.Key.IfName) {
				return errors.New("no lease")
			}
			return nil
		})
	}
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", HostLocal, command, err)
	}
	return result, nil
}
