// SPDX-License-Identifier: MPL-2.0

// Package dump reads lists of the kernel's that may change meanwhile.
package dump

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// List repeats a read of a kernel's list that changed meanwhile.
func List[T any](list func() ([]T, error)) (found []T, err error) {
	for range 5 {
		if found, err = list(); !errors.Is(err, nl.ErrDumpInterrupted) {
			break
		}
	}
	return found, err
}

// Nftables are the attributes of each object of nf_tables in the calling thread's
// namespace that a message lists, such as NFT_MSG_GETCHAIN. Package nftables asks chain by
// chain, takes apart what nobody reads, and does it over a socket of another kind: for the
// chains a tenth of an ADD.
func Nftables(message int, family uint8, filter ...nl.NetlinkRequestData) ([][]syscall.NetlinkRouteAttr, error) {
	return List(func() ([][]syscall.NetlinkRouteAttr, error) {
		request := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|message, unix.NLM_F_DUMP)
		request.AddData(&nl.Nfgenmsg{NfgenFamily: family})
		for _, attribute := range filter {
			request.AddData(attribute)
		}
		messages, err := request.Execute(unix.NETLINK_NETFILTER, 0)
		if err != nil {
			return nil, err
		}
		objects := make([][]syscall.NetlinkRouteAttr, len(messages))
		for i, text := range messages {
			if len(text) < nl.SizeofNfgenmsg {
				return nil, fmt.Errorf("message of %d bytes", len(text))
			}
			if objects[i], err = nl.ParseRouteAttr(text[nl.SizeofNfgenmsg:]); err != nil {
				return nil, err
			}
		}
		return objects, nil
	})
}
