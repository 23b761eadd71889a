// SPDX-License-Identifier: MPL-2.0

package maintain

import (
	"fmt"

	"github.com/hashicorp/cli"
	"github.com/hashicorp/hcl/v2"
	"github.com/posener/complete"
	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/cni/request"
)

// ConfigReport is what config validate prints as JSON.
type ConfigReport struct {
	Schema   int             `json:"schema"`
	Valid    bool            `json:"valid"`
	Files    []string        `json:"files"`
	Problems []configProblem `json:"problems"`
}

// configProblem is one problem and where it is. File is empty where no line of a
// file is at fault.
type configProblem struct {
	Severity string `json:"severity"` // error or warning
	File     string `json:"file,omitempty"`
	Line     int    `json:"line,omitempty"`
	Column   int    `json:"column,omitempty"`
	Summary  string `json:"summary"`
	Detail   string `json:"detail"`
}

func NewConfigValidate(env base.Env) *base.Command {
	c := base.New(env, "config validate", "Check configuration files", `  Checks a file, or the .hcl files of a directory, by the rules of the agent and of
  the plugin, and shows the line of each error. Without PATH it checks /etc/weir.d.
  It asks nothing of the node and changes nothing, so that it can run where the
  files are written. The environment, which wins over them on a node, is not read.

  The exit code is 0 where agent and plugin accept the files, and 1 otherwise.

  Check the directory before it goes to a node:

      $ weir config validate ./weir.d`).WithJSON().WithOperands(1, "[PATH]")
	c.AsUser = func() bool { return true }
	c.Predict = complete.PredictFiles("*")
	c.Do = func() (int, error) {
		path := c.Operand()
		if path == "" {
			path = request.DefaultConfigDir
		}
		checked, err := configfile.CheckConfig(path)
		if err != nil {
			return 1, err
		}
		if !checked.Problems.HasErrors() { // the plugin's rules are stricter in some respects
			if err := request.CheckPolicy(checked.Files); err != nil {
				checked.Problems = append(checked.Problems, &hcl.Diagnostic{
					Severity: hcl.DiagError, Summary: "Refused by the plugin", Detail: err.Error(),
				})
			}
		}
		code := 0
		if checked.Problems.HasErrors() {
			code = 1
		}
		if c.JSON {
			return code, c.PrintJSON(reportOf(checked))
		}
		writer := hcl.NewDiagnosticTextWriter(&cli.UiWriter{Ui: c.UI}, checked.Sources, base.Columns-2, c.Coloured())
		if err := writer.WriteDiagnostics(checked.Problems); err != nil {
			return 1, fmt.Errorf("print problems: %w", err)
		}
		switch {
		case code != 0:
			c.UI.Output(c.Paint(base.Red, fmt.Sprintf("%s: not valid: %s", path, base.CountOf(len(checked.Problems.Errs()), "error"))))
		case len(checked.Files) == 0:
			c.UI.Output(c.Paint(base.Green, path+": valid: it has no .hcl file, every key has its default"))
		default:
			c.UI.Output(c.Paint(base.Green, fmt.Sprintf("%s: valid: %s", path, base.CountOf(len(checked.Files), "file"))))
		}
		return code, nil
	}
	return c
}

func reportOf(checked configfile.CheckedConfig) ConfigReport {
	report := ConfigReport{Schema: 1, Valid: !checked.Problems.HasErrors(), Files: append([]string{}, checked.Files...), Problems: []configProblem{}}
	for _, problem := range checked.Problems {
		each := configProblem{Severity: "error", Summary: problem.Summary, Detail: problem.Detail}
		if problem.Severity == hcl.DiagWarning {
			each.Severity = "warning"
		}
		if at := problem.Subject; at != nil {
			each.File, each.Line, each.Column = at.Filename, at.Start.Line, at.Start.Column
		}
		report.Problems = append(report.Problems, each)
	}
	return report
}
