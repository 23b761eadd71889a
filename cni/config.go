// SPDX-License-Identifier: MPL-2.0

package cni

import (
	"encoding/json"
	"fmt"
	"path/filepath"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/weirmesh/weir/cni/request"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
)

// netConf is the plugin's configuration on stdin: what of it the plugin reads.
// Keys that it does not read, such as log_level, are accepted.
type netConf struct {
	CNIVersion string `json:"cniVersion"`
	request.Network

	PinDir     string `json:"pinDir"`
	StateDir   string `json:"stateDir"`
	CgroupRoot string `json:"cgroupRoot"`

	PrevResult json.RawMessage `json:"prevResult"`
	Valid      json.RawMessage `json:"cni.dev/valid-attachments"`
	// Attachments is the name that runtimes used before the specification
	// settled on the other.
	Attachments json.RawMessage `json:"cni.dev/attachments"`

	keys     map[string]json.RawMessage // all of them, as they came
	previous *result                    // nil without a prevResult
}

// decodeConfig reads the configuration as DEL and GC need it: without a look
// at the previous result or at keys that matter to ADD alone.
func decodeConfig(stdin []byte) (*netConf, error) {
	conf := &netConf{}
	if err := json.Unmarshal(stdin, conf); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, fmt.Sprintf("read network configuration: %v", err), "")
	}
	if err := json.Unmarshal(stdin, &conf.keys); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, fmt.Sprintf("read network configuration: %v", err), "")
	}
	paths := []struct{ key, value string }{
		{"pinDir", conf.PinDir}, {"stateDir", conf.StateDir}, {"cgroupRoot", conf.CgroupRoot},
	}
	for _, path := range paths {
		if path.value != "" && !filepath.IsAbs(path.value) {
			return nil, conf.refuse(types.ErrInvalidNetworkConfig, "%s %s: want an absolute path", path.key, request.Quote(path.value))
		}
	}
	return conf, nil
}

// parseConfig reads the whole configuration, previous result included.
func parseConfig(stdin []byte) (*netConf, error) {
	conf, err := decodeConfig(stdin)
	if err != nil || request.Empty(conf.PrevResult) {
		return conf, err
	}
	conf.previous, err = parseResult(conf.PrevResult, conf.CNIVersion)
	if err != nil {
		return nil, conf.refuse(types.ErrDecodingFailure, "prevResult: %v", err)
	}
	return conf, nil
}

// refuseInterfaceKeys refuses what only the first plugin of a chain can do.
func (c *netConf) refuseInterfaceKeys() error {
	for _, key := range interfaceKeys() {
		if !request.Empty(c.keys[key]) {
			return c.refuse(types.ErrUnsupportedField, "%s: behind another plugin none of the network is made: remove the key, or make this plugin the first of the chain", key)
		}
	}
	return nil
}

func (c *netConf) refuse(code uint, format string, values ...any) error {
	return types.NewError(code, fmt.Sprintf("network %s: ", c.Name)+fmt.Sprintf(format, values...), "")
}

func (c *netConf) paths() store.Paths {
	return store.Paths{PinDir: c.PinDir, StateDir: c.StateDir, CgroupRoot: c.CgroupRoot}
}

// validAttachments is the list that GC was given. A missing list is an error,
// because taking it for an empty one would end every workload of the network;
// null is how a runtime written in Go writes an empty one.
func (c *netConf) validAttachments() ([]workload.AttachmentID, error) {
	list := c.Valid
	if list == nil {
		list = c.Attachments
	}
	if list == nil {
		return nil, c.refuse(types.ErrInvalidNetworkConfig, "cni.dev/valid-attachments: missing: nothing is collected without a list of what is valid")
	}
	var attachments []types.GCAttachment
	if err := json.Unmarshal(list, &attachments); err != nil {
		return nil, c.refuse(types.ErrDecodingFailure, "cni.dev/valid-attachments: %v", err)
	}
	valid := make([]workload.AttachmentID, 0, len(attachments))
	for i, attachment := range attachments {
		if attachment.ContainerID == "" || attachment.IfName == "" {
			return nil, c.refuse(types.ErrInvalidNetworkConfig, "cni.dev/valid-attachments[%d]: want containerID and ifname", i)
		}
		valid = append(valid, workload.AttachmentID{ContainerID: attachment.ContainerID, IfName: attachment.IfName})
	}
	return valid, nil
}
