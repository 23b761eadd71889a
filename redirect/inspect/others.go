// SPDX-License-Identifier: MPL-2.0

package inspect

import (
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/moby/sys/mountinfo"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/program"
)

// Other is a program of somebody else on one of Weir's hooks. Each of them may
// refuse a socket's call, and rewrite where it goes.
type Other struct {
	ID        uint32 `json:"id"`
	Name      string `json:"name"`
	Hook      string `json:"hook"`  // as libbpf names it
	Order     string `json:"order"` // "before" or "after" Weir's program; empty where that is not attached
	Effect    string `json:"effect"`
	UID       uint32 `json:"uid"`              // who loaded it
	Weir      bool   `json:"weir"`             // of another instance of Weir
	Exclusive bool   `json:"exclusive"`        // it has the hook for itself: Weir cannot be attached beside it
	Pinned    string `json:"pinned,omitempty"` // where its link is pinned, as far as that can be seen; see NameOthers
	Owner     string `json:"owner,omitempty"`  // a process that holds its link; likewise
}

// others lists the programs at the root that are not of these sets.
func (d *Reader) others(root *os.File, own []*program.Set) (list []Other, err error) {
	list = []Other{}
	for _, h := range program.Hooks() {
		programs, err := program.AttachedTo(root, h.Attach)
		if err != nil {
			return list, err
		}
		mine := func(p program.AttachedProgram) bool {
			return slices.ContainsFunc(own, func(s *program.Set) bool { return slices.Contains(s.Programs[h.Program], p.ID) })
		}
		exclusive, err := program.Exclusive(root, h.Attach)
		if err != nil {
			return list, err
		}
		at := slices.IndexFunc(programs, mine)
		for i, p := range programs {
			if mine(p) {
				continue
			}
			other := Other{ID: uint32(p.ID), Name: p.Name, UID: p.UID, Hook: h.Attach.String(), Weir: p.Name == h.Program, Exclusive: exclusive, Effect: effectAt(h.Attach)}
			switch {
			case at >= 0 && i < at:
				other.Order = "before"
			case at >= 0:
				other.Order = "after"
			}
			if other.Weir {
				other.Effect = "serves namespaces of its own, and no other"
			}
			list = append(list, other)
		}
	}
	return list, nil
}

// effectAt says what the kernel lets a program do at a hook. What it does there,
// nobody but its owner can tell.
func effectAt(attach ebpf.AttachType) string {
	switch attach {
	case ebpf.AttachCGroupInet4Connect, ebpf.AttachCGroupInet6Connect, ebpf.AttachCGroupUDP4Sendmsg, ebpf.AttachCGroupUDP6Sendmsg:
		return "may refuse a connection or datagram, or send it elsewhere"
	case ebpf.AttachCGroupInet4PostBind, ebpf.AttachCGroupInet6PostBind:
		return "may refuse a bind"
	case ebpf.AttachCGroupGetsockopt:
		return "may change the answer to getsockopt, SO_ORIGINAL_DST among it"
	case ebpf.AttachCGroupSockOps:
		return "may change options of a TCP socket"
	}
	return "may change the address that a socket is told"
}

// NameOthers finds pins and processes that hold the programs' links, as far as
// this process sees the mounts and processes. It goes through every link, pin and
// process of the node, so it is for who shows them.
func (d *Reader) NameOthers(list []Other) {
	if len(list) == 0 {
		return
	}
	programs := make(map[link.ID]uint32)
	wanted := func(id uint32) bool { return slices.ContainsFunc(list, func(o Other) bool { return o.ID == id }) }
	_ = program.EachLink(func(_ link.Link, info *link.Info) error {
		if wanted(uint32(info.Program)) {
			programs[info.ID] = uint32(info.Program)
		}
		return nil
	})
	note := func(id uint32, set func(*Other)) {
		for i := range list {
			if list[i].ID == id {
				set(&list[i])
			}
		}
	}
	for _, mount := range bpffsMounts() {
		d.eachPinnedLink(mount, func(path string, id uint32) { note(id, func(o *Other) { o.Pinned = path }) })
	}
	for id, process := range linkHolders(programs) {
		note(id, func(o *Other) { o.Owner = process })
	}
}

// eachPinnedLink visits the links that are pinned below a directory, with their programs,
// but for those of this instance's lookup programs: none of them is at the root.
func (d *Reader) eachPinnedLink(dir string, visit func(path string, id uint32)) {
	_ = filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && path == d.paths.Lookups() {
			return fs.SkipDir
		}
		if err != nil || entry.IsDir() {
			return nil
		}
		pinned, err := link.LoadPinnedLink(path, nil)
		if err != nil {
			return nil // a map, a program
		}
		defer pinned.Close()
		if info, err := pinned.Info(); err == nil {
			visit(path, uint32(info.Program))
		}
		return nil
	})
}

// bpffsMounts are where a bpffs is mounted.
func bpffsMounts() (list []string) {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("bpf"))
	if err != nil {
		return nil
	}
	for _, mount := range mounts {
		list = append(list, mount.Mountpoint)
	}
	return list
}

// linkHolders names a process for each program whose link one has open.
func linkHolders(programs map[link.ID]uint32) map[uint32]string {
	holders := make(map[uint32]string)
	processes, err := os.ReadDir("/proc")
	if err != nil || len(programs) == 0 {
		return holders
	}
	for _, process := range processes {
		pid, err := strconv.Atoi(process.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		for _, id := range openLinks(process.Name()) {
			if prog := programs[id]; prog != 0 {
				holders[prog] = host.ProcessName(pid)
			}
		}
	}
	return holders
}

// openLinks are the links that a process has open; none of one that ended.
func openLinks(pid string) (list []link.ID) {
	dir := filepath.Join("/proc", pid)
	fds, err := os.ReadDir(filepath.Join(dir, "fd"))
	if err != nil {
		return nil
	}
	for _, fd := range fds {
		if target, err := os.Readlink(filepath.Join(dir, "fd", fd.Name())); err != nil || target != "anon_inode:bpf_link" {
			continue
		}
		text, err := os.ReadFile(filepath.Join(dir, "fdinfo", fd.Name()))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(text)) {
			value, found := strings.CutPrefix(line, "link_id:")
			if id, err := strconv.ParseUint(strings.TrimSpace(value), 10, 32); found && err == nil {
				list = append(list, link.ID(id))
			}
		}
	}
	return list
}

// OwnSets returns this instance's sets among sets, the one first that serves most
// of the workloads on record. One that does not say for sure whose it is belongs to
// whose workloads it serves.
func (d *Reader) OwnSets(sets []*program.Set) (own []*program.Set) {
	cookies := sync.OnceValue(d.cookies) // most nodes have one set, which says whose it is
	served := make(map[*program.Set]int)
	serves := func(s *program.Set) int {
		if _, counted := served[s]; !counted {
			served[s] = s.Serves(cookies())
		}
		return served[s]
	}
	for _, s := range sets {
		unnamed := s.Instance == 0 || s.Instance == program.FormerInstanceOf(d.paths)
		if s.Instance == program.InstanceOf(d.paths) || unnamed && serves(s) > 0 {
			own = append(own, s)
		}
	}
	slices.SortStableFunc(own, func(a, b *program.Set) int { return serves(b) - serves(a) })
	return own
}
