// SPDX-License-Identifier: MPL-2.0

package attachment

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"golang.org/x/sys/unix"

	current "github.com/containernetworking/cni/pkg/types/100"
)

// Who maps the host ports of an attachment.
const (
	MapperWeir    = "weir"
	MapperPortmap = "portmap" // the reference plugin, for attachments of earlier versions
)

type IpConfig = current.IPConfig

// Record is what the node remembers of one attachment: with what it was made,
// so that it can be removed without any help from the runtime.
type Record struct {
	Config
	Attachment
	Cookie   uint64          `json:"cookie,string"`
	BootID   string          `json:"boot_id"`
	Complete bool            `json:"complete"`
	Result   *current.Result `json:"result,omitempty"`
	Mapper   string          `json:"mapper,omitempty"` // who maps host ports; empty: nobody, or not known
	Ports    []Port          `json:"ports,omitempty"`  // that are mapped by Weir itself

	Fresh  bool `json:"-"` // nobody knew the key before this call: no lease is looked for
	Leased bool // by this call
	Lost   bool // there is no record: this one is made of what the caller knows
}

// Records are those below a state directory.
type Records struct {
	StateDir string

	Ctx context.Context // of who waits for the lock
}

// Dir is where the records are.
func (n Records) Dir() string { return filepath.Join(n.StateDir, "networks") }

// Path is that of one record.
func (n Records) Path(key workload.AttachmentID) string {
	return filepath.Join(n.Dir(), key.String()+".json")
}

// Read returns redirect.ErrUnknown where there is none. One of an earlier
// boot is never complete: its namespace is gone, its lease may not be.
func (n Records) Read(key workload.AttachmentID) (*Record, error) {
	return ReadRecordFile(n.Path(key))
}

func ReadRecordFile(path string) (*Record, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, store.ErrUnknown
	}
	if err != nil {
		return nil, fmt.Errorf("read record: %w", err)
	}
	r := new(Record)
	if err := json.Unmarshal(data, r); err != nil {
		// Written in one step, so this is no half of one. What it stood for
		// is found by its key.
		return nil, fmt.Errorf("read record %s: %w: %w", path, store.ErrUnknown, err)
	}
	boot, err := BootID()
	if err != nil {
		return nil, err
	}
	if r.PortMappings != nil && r.Mapper == "" {
		r.Mapper = MapperPortmap // earlier versions had no other
	}
	r.Complete = r.Complete && r.BootID == boot && r.Result != nil
	return r, nil
}

// Write replaces the record in one step.
func (n Records) Write(r *Record) (err error) {
	if r.BootID, err = BootID(); err != nil {
		return err
	}
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	if err := os.MkdirAll(n.Dir(), 0o700); err != nil {
		return fmt.Errorf("create record directory: %w", err)
	}
	path := n.Path(r.Key)
	if err := os.WriteFile(path+".tmp", append(data, '\n'), 0o600); err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	return nil
}

// Remove removes the record, or what a write that died left of it.
func (n Records) Remove(key workload.AttachmentID) error {
	for _, path := range []string{n.Path(key) + ".tmp", n.Path(key)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove record: %w", err)
		}
	}
	return nil
}

// ReadAll returns every record that can be read, and what could not be.
func (n Records) ReadAll() ([]*Record, error) {
	entries, err := os.ReadDir(n.Dir())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list records: %w", err)
	}
	var records []*Record
	var problems []error
	for _, entry := range entries {
		if !strings.HasSuffix(entry.Name(), ".json") {
			continue
		}
		path := filepath.Join(n.Dir(), entry.Name())
		r, err := ReadRecordFile(path)
		if err != nil {
			if _, gone := os.Lstat(path); !errors.Is(gone, fs.ErrNotExist) { // else a DEL removed it meanwhile
				problems = append(problems, err)
			}
			continue
		}
		records = append(records, r)
	}
	return records, errors.Join(problems...)
}

// Locked runs action while no other process changes what attachments share:
// the bridge, its ports, and the rules for it.
func (n Records) Locked(action func() error) error {
	return store.Locked(n.Ctx, filepath.Join(n.StateDir, "network.lock"), action)
}

func BootID() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot ID: %w", err)
	}
	return strings.TrimSpace(string(id)), nil
}

// Port is one translation: what arrives for host and port goes to the
// allocation. An unspecified host stands for every address of the node in its family.
type Port struct {
	Protocol  uint8          `json:"protocol"`
	Host      netip.AddrPort `json:"host"`
	Container netip.AddrPort `json:"container"`
}

func (p Port) String() string {
	return fmt.Sprintf("%s %s", ProtocolNames()[p.Protocol], p.Host)
}

func ProtocolNames() map[uint8]string {
	return map[uint8]string{unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp", unix.IPPROTO_SCTP: "sctp"}
}

func (p Port) SameHost(other Port) bool {
	return p.Protocol == other.Protocol && p.Host == other.Host
}
