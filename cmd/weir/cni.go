// SPDX-License-Identifier: MPL-2.0

package main

import (
	"encoding/json"
	"fmt"
)

// cniError is the CNI error with which weir answers a call that was meant for
// the plugin: cni_path holds the wrong file.
func cniError(command, containerID string) string {
	const invalidEnvironment = 4 // CNI: invalid necessary environment variables
	text, err := json.MarshalIndent(struct {
		CNIVersion string `json:"cniVersion"`
		Code       int    `json:"code"`
		Msg        string `json:"msg"`
		Details    string `json:"details"`
	}{
		CNIVersion: "1.1.0",
		Code:       invalidEnvironment,
		Msg:        "this is the weir CLI, not the CNI plugin: put weir-cni in cni_path as weir and consul-cni",
		Details:    fmt.Sprintf("CNI_COMMAND is %q, CNI_CONTAINERID is %q", command, containerID),
	}, "", "  ")
	if err != nil { // strings and an integer always have a JSON form
		return err.Error()
	}
	return string(text)
}
