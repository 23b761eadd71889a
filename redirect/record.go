// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// recordSchema numbers the fields of a record. A field that is added does not
// change it; one that means something else than before does.
const recordSchema = 1

// errNewer: the record is of a newer version, whose fields may mean something else.
var errNewer = errors.New("a newer version wrote it")

// record is what a node remembers of one workload, in a file of its own. It is
// written before the first change to the kernel and removed after the last, so
// that a process that dies in between leaves something to finish or to undo.
type record struct {
	Schema     int          `json:"schema"` // recordSchema; 0 in a record from before there were schemas
	Key        AttachmentID `json:"key"`
	Request    Request      `json:"request"`
	MeshConfig MeshConfig   `json:"overlay,omitzero"`
	NetNS      string       `json:"netns"`
	Cookie     uint64       `json:"cookie,string"`
	BootID     string       `json:"boot_id"`
	// Found are the addresses of the namespace, those that the request does not
	// name and those that came after ADD included: they are the workload's own.
	Found []netip.Addr `json:"found,omitempty"`
	// Broadcasts are the broadcast addresses of its networks.
	Broadcasts []netip.Addr `json:"broadcasts,omitempty"`
	// Sources are those of them that redirected connections have.
	Sources Sources `json:"sources,omitzero"`
	// Sliced says that there were several at some time.
	Sliced bool `json:"sliced,omitempty"`
	// Ephemeral is the namespace's range of ports for the replies to its own datagrams.
	Ephemeral PortRange `json:"ephemeral"`
	// Strangers are cgroups under the proxy's UID that are known not to be the
	// proxy's: their listeners are not registered.
	RejectedCgroups []uint64 `json:"strangers,omitempty"`
	// IPv6 says that the encoded IPv6 range is routed in the namespace.
	IPv6 bool `json:"ipv6"`
	// Seats are those of the proxies that MeshConfig names.
	Seats []uint8 `json:"seats,omitempty"`
	// Complete says that the kernel's rows are those of Applied and no others.
	Complete bool `json:"complete"`
	// Applied is the workload that the rows in force were made from.
	Applied Workload `json:"applied,omitzero"`

	fresh bool // made by this call: nobody can have left rows of it
	dirty bool // differs from its file in what has no rows
}

func (r *record) desired() Workload {
	w := Merge(r.Request, r.MeshConfig)
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

// bootID tells records of this boot from older ones, whose cookies mean
// nothing any more.
func bootID() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot ID: %w", err)
	}
	return strings.TrimSpace(string(id)), nil
}

// readRecord returns ErrUnknown where there is no record, or only one of an
// earlier boot, and ErrUnreadable where there is one that cannot be read.
func (p Paths) readRecord(key AttachmentID) (*record, error) {
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	return readRecordFile(p.record(key), boot)
}

func readRecordFile(path, boot string) (*record, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrUnknown
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnreadable, err)
	}
	// These first, one by one: the rest of a newer record may be of other types.
	var header struct {
		Schema int    `json:"schema"`
		BootID string `json:"boot_id"`
	}
	whole := json.Unmarshal(data, &header) == nil
	if whole && header.BootID != "" && header.BootID != boot {
		return nil, ErrUnknown
	}
	if whole && header.Schema > recordSchema {
		return nil, fmt.Errorf("%w: %s has schema %d, this version knows %d: %w", ErrUnreadable, path, header.Schema, recordSchema, errNewer)
	}
	r := new(record)
	if err := json.Unmarshal(data, r); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrUnreadable, path, err)
	}
	if r.BootID != boot {
		return nil, ErrUnknown
	}
	return r, nil
}

// writeRecord replaces a record in one step. /run is in memory, so there is
// nothing to sync.
func (p Paths) writeRecord(r *record) error {
	r.Schema = recordSchema
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	if err := os.MkdirAll(p.workloads(), 0o700); err != nil {
		return fmt.Errorf("create record directory: %w", err)
	}
	path := p.record(r.Key)
	if err := os.WriteFile(path+".tmp", append(data, '\n'), 0o600); err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	return nil
}

func (p Paths) removeRecord(key AttachmentID) error {
	for _, path := range []string{p.record(key) + ".tmp", p.record(key) + asideSuffix, p.record(key)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove record: %w", err)
		}
	}
	return nil
}

// asideSuffix is that of a record that could not be read, once it is out of the way.
const asideSuffix = ".unreadable"

// setAside moves a record that cannot be read out of the way of the one that
// takes its place. It is kept for somebody to look at, until DEL.
func (p Paths) setAside(key AttachmentID) error {
	if err := os.Rename(p.record(key), p.record(key)+asideSuffix); err != nil {
		return fmt.Errorf("set record aside: %w", err)
	}
	return nil
}

// readRecords returns every record of this boot. A record that cannot be read
// does not hide the others: it comes back in the error, which is ErrUnreadable.
func (p Paths) readRecords() ([]*record, error) {
	entries, err := os.ReadDir(p.workloads())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list records: %w", err)
	}
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	var records []*record
	var problems []error
	for _, entry := range entries {
		if !strings.HasSuffix(entry.Name(), ".json") {
			continue
		}
		r, err := readRecordFile(filepath.Join(p.workloads(), entry.Name()), boot)
		switch {
		case errors.Is(err, ErrUnknown):
		case err != nil:
			problems = append(problems, err)
		default:
			records = append(records, r)
		}
	}
	return records, errors.Join(problems...)
}

// ErrUnknown: there is no such workload on this node.
var ErrUnknown = errors.New("unknown workload")

// ErrUnreadable: there is a record, but this version cannot read it.
var ErrUnreadable = errors.New("record cannot be read")
