// SPDX-License-Identifier: MPL-2.0

package traffic

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/cmd/weir/base"
)

// The formats of -o.
const (
	outputTable = "table" // a line of 80 columns each
	outputDict  = "dict"  // a key of the JSON on each line, nothing cut off
	outputJSON  = "json"
)

// chooseOutput takes in -o, which has what -json says as one of its formats.
func chooseOutput(c *base.Command, output string, summary bool) error {
	switch output {
	case "", outputJSON:
		c.JSON = c.JSON || output == outputJSON
	case outputTable, outputDict:
		if c.JSON {
			return fmt.Errorf("-json beside -o %s: give one of them", output)
		}
		if output == outputDict && summary {
			return errors.New("-summary is a table or JSON, and no -o dict")
		}
	default:
		return fmt.Errorf("read -o: %q is none of %s, %s and %s", output, outputTable, outputDict, outputJSON)
	}
	return nil
}

// flowDict has a line for each key of a flow's JSON; of what lies within another the name is
// both, as in source.job.
func flowDict(flow api.Flow) (string, error) {
	data, err := json.Marshal(flow)
	if err != nil {
		return "", fmt.Errorf("render flow: %w", err)
	}
	in := json.NewDecoder(strings.NewReader(string(data)))
	in.UseNumber()
	var text strings.Builder
	var within []string
	for key := ""; ; {
		token, err := in.Token()
		if err != nil {
			return text.String(), nil //nolint:nilerr // its end: it was rendered above
		}
		switch value := token.(type) {
		case json.Delim:
			if value == '{' {
				within = append(within, key)
			} else {
				within = within[:len(within)-1]
			}
			key = ""
		case string:
			if key == "" {
				key = value
				continue
			}
			writeKey(&text, within, key, base.Cell(value))
			key = ""
		default:
			writeKey(&text, within, key, fmt.Sprint(value))
			key = ""
		}
	}
}

func writeKey(text *strings.Builder, within []string, key, value string) {
	name := strings.TrimPrefix(strings.Join(append(within[1:len(within):len(within)], key), "."), ".")
	if name != "schema" {
		fmt.Fprintf(text, "%22s: %s\n", name, value)
	}
}
