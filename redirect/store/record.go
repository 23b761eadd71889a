// SPDX-License-Identifier: MPL-2.0

package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/weirmesh/weir/redirect/workload"
)

// recordSchema numbers the fields of a record. A field that is added does not
// change it; one that means something else than before does.
const recordSchema = 1

// ErrNewer: the record is of a newer version, whose fields may mean something else.
var ErrNewer = errors.New("a newer version wrote it")

// Record is what a node remembers of one workload, in a file of its own. It is
// written before the first change to the kernel and removed after the last, so
// that a process that dies in between leaves something to finish or to undo.
type Record struct {
	Schema     int                   `json:"schema"` // recordSchema; 0 in a record from before there were schemas
	Key        workload.AttachmentID `json:"key"`
	Request    workload.Request      `json:"request"`
	MeshConfig workload.MeshConfig   `json:"overlay,omitzero"`
	NetNS      string                `json:"netns"`
	Cookie     uint64                `json:"cookie,string"`
	BootID     string                `json:"boot_id"`
	// Added is when the namespace was put under Weir; zero: nobody knows.
	Added time.Time `json:"added,omitzero"`
	// Found are the addresses of the namespace, those that the request does not
	// name and those that came after ADD included: they are the workload's own.
	Found []netip.Addr `json:"found,omitempty"`
	// Broadcasts are the broadcast addresses of its networks.
	Broadcasts []netip.Addr `json:"broadcasts,omitempty"`
	// Sources are those of them that redirected connections have.
	Sources workload.Sources `json:"sources,omitzero"`
	// Sliced says that there were several at some time.
	Sliced bool `json:"sliced,omitempty"`
	// Ephemeral is the namespace's range of ports for the replies to its own datagrams.
	Ephemeral workload.PortRange `json:"ephemeral"`
	// Strangers are cgroups under the proxy's UID that are known not to be the
	// proxy's: their listeners are not registered.
	RejectedCgroups []uint64 `json:"strangers,omitempty"`
	// IPv6 says that the encoded IPv6 range is routed in the namespace.
	IPv6 bool `json:"ipv6"`
	// Seats are those of the proxies that MeshConfig names.
	Seats []uint8 `json:"seats,omitempty"`
	// State says how the kernel's rows stand to Applied.
	State State `json:"complete"`
	// Applied is the workload that the rows in force were made from.
	Applied workload.Workload `json:"applied,omitzero"`

	Dirty bool `json:"-"` // differs from its file in what has no rows
}

func (r *Record) Desired() workload.Workload {
	w := workload.Merge(r.Request, r.MeshConfig)
	w.Ephemeral = r.Ephemeral
	w.Seats = r.Seats
	w.Sources, w.Sliced = r.Sources, r.Sliced
	w.Broadcasts = r.Broadcasts
	if len(r.Found) > 0 { // else it was not looked at yet
		w.Addresses = slices.DeleteFunc(w.Addresses, func(addr netip.Addr) bool { return !slices.Contains(r.Found, addr) })
	}
	for _, addr := range r.Found {
		if !slices.Contains(w.Addresses, addr) {
			w.Addresses = append(w.Addresses, addr)
		}
	}
	return w
}

// BootID tells records of this boot from older ones, whose cookies mean
// nothing any more.
func BootID() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot ID: %w", err)
	}
	return strings.TrimSpace(string(id)), nil
}

// ReadRecord returns ErrUnknown where there is no record, or only one of an
// earlier boot, and ErrUnreadable where there is one that cannot be read.
func (p Paths) ReadRecord(key workload.AttachmentID) (*Record, error) {
	boot, err := BootID()
	if err != nil {
		return nil, err
	}
	return readRecordFile(p.Record(key), boot)
}

func readRecordFile(path, boot string) (*Record, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrUnknown
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnreadable, err)
	}
	r := new(Record)
	if err := json.Unmarshal(data, r); err != nil {
		// The rest of a newer record may be of other types, and nobody needs that of
		// an earlier boot. Only here, as an agent reads all records in each pass.
		var header struct {
			Schema int    `json:"schema"`
			BootID string `json:"boot_id"`
		}
		if json.Unmarshal(data, &header) != nil {
			return nil, fmt.Errorf("%w: %s: %w", ErrUnreadable, path, err)
		}
		if header.BootID != "" && header.BootID != boot {
			return nil, ErrUnknown
		}
		if header.Schema <= recordSchema {
			return nil, fmt.Errorf("%w: %s: %w", ErrUnreadable, path, err)
		}
		r.Schema, r.BootID = header.Schema, boot
	}
	switch {
	case r.BootID != "" && r.BootID != boot:
		return nil, ErrUnknown
	case r.Schema > recordSchema:
		return nil, fmt.Errorf("%w: %s has schema %d, this version knows %d: %w", ErrUnreadable, path, r.Schema, recordSchema, ErrNewer)
	case r.BootID == "":
		return nil, ErrUnknown
	}
	return r, nil
}

// WriteRecord replaces a record in one step. /run is in memory, so there is
// nothing to sync.
func (p Paths) WriteRecord(r *Record) error {
	r.Schema = recordSchema
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	if err := os.MkdirAll(p.Workloads(), 0o700); err != nil {
		return fmt.Errorf("create record directory: %w", err)
	}
	path := p.Record(r.Key)
	if err := os.WriteFile(path+".tmp", append(data, '\n'), 0o600); err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	return nil
}

func (p Paths) RemoveRecord(key workload.AttachmentID) error {
	for _, path := range []string{p.Record(key) + ".tmp", p.Record(key) + AsideSuffix, p.Record(key)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove record: %w", err)
		}
	}
	return nil
}

// AsideSuffix is that of a record that could not be read, once it is out of the way.
const AsideSuffix = ".unreadable"

// SetAside moves a record that cannot be read out of the way of the one that
// takes its place. It is kept for somebody to look at, until DEL.
func (p Paths) SetAside(key workload.AttachmentID) error {
	if err := os.Rename(p.Record(key), p.Record(key)+AsideSuffix); err != nil {
		return fmt.Errorf("set record aside: %w", err)
	}
	return nil
}

// ReadRecords returns every record of this boot. A record that cannot be read
// does not hide the others: it comes back in the error, which is ErrUnreadable.
func (p Paths) ReadRecords() ([]*Record, error) { return new(RecordCache).ReadRecords(p) }

// ErrUnknown: there is no such workload on this node.
var ErrUnknown = errors.New("unknown workload")

// ErrUnreadable: there is a record, but this version cannot read it.
var ErrUnreadable = errors.New("record cannot be read")
