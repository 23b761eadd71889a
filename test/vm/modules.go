// SPDX-License-Identifier: MPL-2.0

package main

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// guestModules are loaded before the tests start, so nothing in the guest needs modprobe. Each is a
// module or built in; one with "?" is not in every kernel.
var guestModules = strings.Fields(`
	virtio_pci virtio_console virtio_rng?
	af_packet inet_diag tcp_diag udp_diag netlink_diag? unix_diag
	veth bridge dummy macvlan ipvlan vrf tun
	nf_tables nf_nat nft_chain_nat nft_nat nft_masq nft_redir nft_ct nft_compat nft_fib_inet nft_reject_inet
	nft_counter? nft_limit nft_log nft_hash nft_numgen nf_conntrack_netlink
	ip_tables ip6_tables iptable_nat iptable_filter iptable_mangle ip6table_nat ip6table_filter
	xt_REDIRECT xt_MASQUERADE xt_nat xt_owner xt_comment xt_conntrack xt_addrtype xt_tcpudp xt_multiport xt_mark xt_bpf
	ipt_REJECT ip6t_REJECT nf_conntrack
	tls? mptcp_diag? xfrm_user
	vxlan geneve? wireguard? ipip? ip_gre?`)

// module is one kernel module, unpacked.
type module struct {
	name string
	elf  []byte
}

// resolveModules returns the modules and what they depend on, in the order in which they load.
// The packages carry no modules.dep (depmod writes it at installation), so the modules' own notes are read.
func resolveModules(dir string, names []string) ([]module, error) {
	files, builtin, err := moduleFiles(dir)
	if err != nil {
		return nil, err
	}
	var order []module
	seen := map[string]bool{}
	var visit func(name string, optional bool) error
	visit = func(name string, optional bool) error {
		if seen[name] || builtin[name] {
			return nil
		}
		seen[name] = true
		path, ok := files[name]
		if !ok && optional {
			return nil
		}
		if !ok {
			return fmt.Errorf("find module %s: the kernel in %s does not have it", name, filepath.Base(dir))
		}
		m, depends, err := readDepending(path)
		if err != nil {
			return fmt.Errorf("read module %s: %w", name, err)
		}
		for _, d := range depends {
			if err := visit(d, false); err != nil {
				return err
			}
		}
		order = append(order, module{name: name, elf: m})
		return nil
	}
	for _, name := range names {
		name, optional := strings.CutSuffix(name, "?")
		if err := visit(name, optional); err != nil {
			return nil, err
		}
	}
	return order, nil
}

// readDepending unpacks one module file, and names what the module depends on.
func readDepending(path string) (data []byte, depends []string, err error) {
	if data, err = readModule(path); err == nil {
		depends, err = moduleDepends(data)
	}
	return data, depends, err
}

// moduleFiles lists the modules of a kernel by their names: those that have a file, and those
// that are built in.
func moduleFiles(dir string) (files map[string]string, builtin map[string]bool, err error) {
	files, builtin = make(map[string]string), make(map[string]bool)
	err = filepath.WalkDir(filepath.Join(dir, "kernel"), func(path string, _ fs.DirEntry, err error) error {
		if name, _, ok := strings.Cut(filepath.Base(path), ".ko"); ok && err == nil {
			files[moduleName(name)] = path
		}
		return err
	})
	if err != nil {
		return nil, nil, fmt.Errorf("list modules: %w", err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil {
		return nil, nil, fmt.Errorf("list built-in modules: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		builtin[moduleName(strings.TrimSuffix(filepath.Base(strings.TrimSpace(line)), ".ko"))] = true
	}
	return files, builtin, nil
}

func moduleName(file string) string { return strings.ReplaceAll(file, "-", "_") }

// readModule unpacks one module file.
func readModule(path string) ([]byte, error) {
	switch filepath.Ext(path) {
	case ".xz":
		return exec.Command("xz", "-dc", path).Output()
	case ".zst":
		return exec.Command("zstd", "-dcq", path).Output()
	case ".gz":
		return exec.Command("gzip", "-dc", path).Output()
	}
	return os.ReadFile(path)
}

// moduleDepends reads "depends=" from a module's .modinfo.
func moduleDepends(object []byte) ([]string, error) {
	file, err := elf.NewFile(bytes.NewReader(object))
	if err != nil {
		return nil, err
	}
	section := file.Section(".modinfo")
	if section == nil {
		return nil, errors.New("no .modinfo")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	var names []string
	for entry := range bytes.SplitSeq(info, []byte{0}) {
		value, ok := bytes.CutPrefix(entry, []byte("depends="))
		if !ok {
			continue
		}
		for name := range strings.SplitSeq(string(value), ",") {
			if name != "" {
				names = append(names, moduleName(name))
			}
		}
	}
	return names, nil
}
