// SPDX-License-Identifier: MPL-2.0

package filter

import (
	"fmt"
	"testing"

	"github.com/google/nftables"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/test"
)

// The kernel lets nobody close a connection before it has freed what was deleted, so who
// changes a filter does not wait for that; and it is closed all the same.
func TestConnectionsAreClosedBehindTheCaller(t *testing.T) {
	test.Need(t, test.Root)
	ns, err := host.OpenNamespace(test.NewNetNS(t).Path)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	err = ns.Do(func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		conn.AddTable(&nftables.Table{Name: FilterTable, Family: nftables.TableFamilyINet})
		return conn.Flush()
	})
	if err != nil {
		t.Fatal(err)
	}
	setter := NewSetter()
	for range closingAtOnce {
		setter.closing <- struct{}{} // as where the kernel keeps so many waiting
	}
	before := test.OpenFiles(t)
	if removed, err := setter.Remove(ns); err != nil || !removed {
		t.Fatalf("remove filter: removed %v, %v", removed, err)
	}
	if open := test.OpenFiles(t); open != before+1 {
		t.Errorf("%d files are open, want the connection beside the %d of before", open, before)
	}
	<-setter.closing
	test.Eventually(t, func() error {
		if open := test.OpenFiles(t); open != before {
			return fmt.Errorf("%d files are open, %d were before", open, before)
		}
		return nil
	}, "the end of the connection")
}
