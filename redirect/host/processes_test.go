// SPDX-License-Identifier: MPL-2.0

package host

import (
	"errors"
	"testing"
	"time"

	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { test.Main(m, nil) }

// Who looks for the owners of listeners in many namespaces asks each process of the node
// once where it is, and those that were found once more; and finds who came later.
func TestProcessesAreAskedOnce(t *testing.T) {
	test.Need(t, test.Root)
	const count = 8
	var processes Processes
	find := func(netns *test.NetNS) error {
		t.Helper()
		ns, err := OpenNamespace(netns.Path)
		if err != nil {
			t.Fatal(err)
		}
		defer ns.Close()
		listeners, err := ns.Listening()
		if err != nil || len(listeners) != 1 {
			t.Fatalf("listeners: %+v, %v; want one", listeners, err)
		}
		root, err := CgroupRoot()
		if err != nil {
			t.Fatal(err)
		}
		fd, _, err := ns.CopySocket(listeners[0].Inode, root, &processes)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if port, err := unix.Getsockname(fd); err != nil || port.(*unix.SockaddrInet4).Port != 15001 {
			t.Errorf("the socket is %+v, %v; want the one on port 15001", port, err)
		}
		return nil
	}
	serve := func() (*test.NetNS, *test.ServerProcess) {
		netns := test.NewNetNS(t)
		return netns, test.EchoProcess(t, test.Spec{NetNS: netns}, "tcp4", "127.0.0.1:15001")
	}
	var spaces []*test.NetNS
	for range count {
		netns, _ := serve()
		spaces = append(spaces, netns)
	}
	all := func() {
		for _, netns := range spaces {
			if err := find(netns); err != nil {
				t.Fatal(err)
			}
		}
	}
	all()
	total := len(processes.left)
	for _, pids := range processes.in {
		total += len(pids)
	}
	t.Logf("%d questions to %d processes for %d namespaces", processes.asked, total, count)
	processes.listed, processes.asked = processes.listed.Add(time.Hour), 0 // however slow this machine is
	if all(); processes.asked != count {
		t.Errorf("%d questions to processes for %d namespaces that are known, want one for each", processes.asked, count)
	}

	late, server := serve()
	if err := find(late); err != nil {
		t.Errorf("one that came after the list: %v", err)
	}
	ns, err := OpenNamespace(late.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	listeners, err := ns.Listening()
	if err != nil || len(listeners) != 1 {
		t.Fatalf("listeners: %+v, %v", listeners, err)
	}
	server.Stop()
	if _, _, err := ns.CopySocket(listeners[0].Inode, "/", &processes); !errors.Is(err, ErrNoOwner) {
		t.Errorf("the socket of a process that ended: %v, want that nobody has it", err)
	}
}
