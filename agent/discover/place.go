// SPDX-License-Identifier: MPL-2.0

package discover

import (
	"errors"

	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/inspect"
)

// Place is where a workload's namespace was last seen to be the one on record.
type Place struct {
	inode  uint64 // 0: it was not seen
	cookie uint64
}

// Left reports whether the namespace on record is not the one that is named now, and is no
// more. An inode tells that nothing changed since the last look, within limits: the
// kernel gives it to another namespace later.
func (p *Place) Left(netns string, r inspect.Record) bool {
	inode := host.Inode(netns)
	if inode != 0 && inode == p.inode && p.cookie == r.Cookie {
		return false
	}
	cookie, err := host.Cookie(netns)
	if err != nil {
		return false
	}
	if cookie == r.Cookie {
		p.inode, p.cookie = inode, cookie
		return false
	}
	if netns == r.NetNS {
		return true
	}
	recorded, err := host.Cookie(r.NetNS)
	return errors.Is(err, host.ErrNetNSGone) || err == nil && recorded != r.Cookie
}

// Forget has the next look ask the namespace itself.
func (p *Place) Forget() { p.inode = 0 }
