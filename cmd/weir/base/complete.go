// SPDX-License-Identifier: MPL-2.0

package base

import (
	"flag"

	"github.com/hashicorp/cli"
	"github.com/posener/complete"
)

var _ cli.CommandAutocomplete = (*Command)(nil)

// AutocompleteArgs says what a shell offers for the command's arguments.
func (c *Command) AutocompleteArgs() complete.Predictor {
	if c.Predict == nil {
		return complete.PredictNothing
	}
	return c.Predict
}

// AutocompleteFlags says what a shell offers for the command's flags and for their values.
func (c *Command) AutocompleteFlags() complete.Flags {
	flags := complete.Flags{"-help": complete.PredictNothing}
	c.Flags.VisitAll(func(f *flag.Flag) {
		value, _ := flag.UnquoteUsage(f)
		var predict complete.Predictor = complete.PredictAnything
		switch value {
		case "": // a switch takes none
			predict = complete.PredictNothing
		case "directory", "directories":
			predict = complete.PredictDirs("*")
		case "file", "path":
			predict = complete.PredictFiles("*")
		}
		flags["-"+f.Name] = predict
	})
	return flags
}
