// SPDX-License-Identifier: MPL-2.0

// Package attachment is what the node remembers of an allocation's place in a network:
// its configuration, its result, and the record of both on disk.
package attachment

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/weirmesh/weir/redirect/workload"
	"golang.org/x/sys/unix"
)

var (
	// ErrForward: the node drops what it forwards, in a way that the plugin
	// must not change by itself.
	ErrForward = errors.New("the node drops forwarded traffic")
	// ErrMissing: a program that the network needs is not on the node.
	ErrMissing = errors.New("not found")
	// ErrInUse: a known key's tasks run in the namespace that it has.
	ErrInUse = errors.New("still runs in its namespace")
	// ErrTaken: a device or chain of that name exists and is somebody else's.
	ErrTaken = errors.New("in use by another")
)

// Config is a network as its conflist describes it.
type Config struct {
	Name       string `json:"name"`
	CNIVersion string `json:"cni_version"`

	Bridge       string `json:"bridge"`
	MTU          int    `json:"mtu"` // 0: that of the node's default route
	Gateway      bool   `json:"gateway"`
	DefaultRoute *bool  `json:"default_route"` // nil: where the IPAM plugin names no route
	ForceAddress bool   `json:"force_address"`
	Masquerade   bool   `json:"masquerade"`
	Hairpin      bool   `json:"hairpin"`
	Promiscuous  bool   `json:"promiscuous"`
	Isolated     bool   `json:"isolated"`

	IPAM         string          `json:"ipam"`      // the plugin's name
	Delegate     json.RawMessage `json:"delegate"`  // the configuration that the IPAM plugin gets
	LeaseDir     string          `json:"lease_dir"` // of host-local; "" where that is not known
	DNS          types.DNS       `json:"dns"`
	PortMappings json.RawMessage `json:"port_mappings,omitempty"` // nil: none
}

// Attachment is one allocation's place in a network, as CNI names it.
type Attachment struct {
	Key   workload.AttachmentID `json:"key"`
	NetNS string                `json:"netns"`
	Args  string                `json:"args"` // CNI_ARGS
	Path  string                `json:"path"` // CNI_PATH, where other plugins are found
}

// HostDevice is the name of an attachment's device on the node: always the
// same for the same key, so that it is found without a record.
func HostDevice(key workload.AttachmentID) string {
	sum := sha256.Sum256([]byte(key.String()))
	return "weir" + hex.EncodeToString(sum[:])[:unix.IFNAMSIZ-1-len("weir")]
}
