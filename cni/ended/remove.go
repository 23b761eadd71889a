// SPDX-License-Identifier: MPL-2.0

package ended

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/weirmesh/weir/cni/network"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/store"
	"golang.org/x/sys/unix"
)

// timeout is longer than any plugin needs for a DEL.
const timeout = time.Minute

// Remove takes away all that is left of an attachment that Find listed. It looks
// once more before: ErrInUse says that somebody came. What fails stays to be
// found again.
func (n Node) Remove(ctx context.Context, listed Attachment) error {
	all, err := n.attachments()
	i := slices.IndexFunc(all, func(a *Attachment) bool { return a.Key == listed.Key })
	if i < 0 {
		return err
	}
	uses, err := findNamespaceUsers()
	if err != nil {
		return err
	}
	a := all[i]
	if a.State, err = uses.of(a); err != nil {
		return err
	}
	if listed.State == Gone && a.State != Gone {
		return fmt.Errorf("it has a namespace again: %w", ErrInUse)
	}
	var problems []error
	if a.list != nil {
		ctx, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		problems = append(problems, n.library().DelNetworkList(ctx, a.list, a.runtime(a.living())))
	}
	// The plugin removed these where it was called. It may be gone from the node,
	// or never have been part of the network.
	if a.known {
		problems = append(problems, redirect.New(n.Paths).Remove(a.Key))
	}
	if a.built {
		problems = append(problems, network.Forget(n.stateDir(), a.Key, n.cniPath()))
	}
	if err := errors.Join(problems...); err != nil || a.mount == "" {
		return err
	}
	if err := unix.Unmount(a.mount, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) { // nothing is mounted there
		return fmt.Errorf("unmount namespace %s: %w", a.mount, err)
	}
	return os.Remove(a.mount)
}

// living is a path that still leads to the namespace, as DEL wants it; empty
// where there is none.
func (a *Attachment) living() string {
	for _, path := range a.paths {
		if _, found, err := inodeOf(path); found && err == nil {
			return path
		}
	}
	return ""
}

// runtime is what Nomad hands to DEL: no arguments of the job.
func (a *Attachment) runtime(netNS string) *libcni.RuntimeConf {
	return &libcni.RuntimeConf{ContainerID: a.Key.ContainerID, IfName: a.Key.IfName, NetNS: netNS, CapabilityArgs: a.args}
}

func (n Node) library() *libcni.CNIConfig {
	path := filepath.SplitList(n.cniPath())
	return libcni.NewCNIConfigWithCacheDir(path, n.cacheDir(), &runner{
		DefaultExec: invoke.DefaultExec{
			RawExec:       &invoke.RawExec{Stderr: n.notes()},
			PluginDecoder: version.PluginDecoder{},
		},
		paths: n.Paths,
	})
}

func (n Node) cniPath() string { return cmp.Or(n.CNIPath, DefaultCNIPath) }

func (n Node) cacheDir() string { return cmp.Or(n.CacheDir, DefaultCacheDir) }

func (n Node) notes() io.Writer {
	if n.Notes == nil {
		return io.Discard
	}
	return n.Notes
}

// runner runs plugins on the instance of Weir that is looked at.
type runner struct {
	invoke.DefaultExec
	paths store.Paths
}

func (r *runner) ExecPlugin(ctx context.Context, plugin string, stdin []byte, environ []string) ([]byte, error) {
	for name, value := range map[string]string{
		"WEIR_PIN_DIR": r.paths.PinDir, "WEIR_STATE_DIR": r.paths.StateDir, "WEIR_CGROUP_ROOT": r.paths.CgroupRoot,
	} {
		if value != "" {
			environ = append(environ, name+"="+value) // of a name that is there twice the last one counts
		}
	}
	return r.DefaultExec.ExecPlugin(ctx, plugin, stdin, environ)
}
