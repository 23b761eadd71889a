// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"flag"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/cli"
	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/test/reference"
)

// TestReferenceOfTheManual holds dist/man to what each command says of itself, and to the
// pages of docs/ about what is configured.
func TestReferenceOfTheManual(t *testing.T) {
	list := commands(base.Env{Ctx: context.Background(), UI: cli.NewMockUi(), Getenv: func(string) string { return "" }})
	var pages []reference.ManPage
	var all strings.Builder
	for _, name := range slices.Sorted(maps.Keys(list)) {
		made, err := list[name]()
		if err != nil {
			t.Fatal(err)
		}
		command := made.(*base.Command)
		page := "weir-" + strings.ReplaceAll(name, " ", "-")
		fmt.Fprintf(&all, "**%s**(1)\n\n:   %s\n\n", page, plain(command.Line))
		pages = append(pages, reference.ManPage{Name: page, Section: 1, Text: manOf(command, page)})
	}
	pages = append(pages, reference.ManPage{Name: "weir", Section: 1, Text: `# NAME

weir - eBPF redirection for Nomad allocations in a Consul service mesh

# SYNOPSIS

**weir** COMMAND [options] [ALLOC | JOB]

# DESCRIPTION

Weir steers the connections of allocations into their own Envoy, and guards what may be reached from outside. The plugin
**weir-cni**(8) puts an allocation under it, the agent **weir-agent**(1) keeps it in sync with Consul. The other
commands ask, tell and repair. Each with data takes **-json**, and prints an object with the key "schema".

# COMMANDS

` + all.String() + `# EXIT STATUS

0; 1 where the command could not do its work or **weir-status**(1) has found something wrong; 2 where
**weir-doctor**(1) has found a fault or **weir-explain**(1) a connection that would fail; 127 where there is no such
command.

# ENVIRONMENT
` + reference.ManText(t, "configuration.md", "The environment") + `
# FILES

/etc/weir.d/weir.hcl

:   the node's configuration, **weir.hcl**(5)

/sys/fs/bpf/weir

:   maps, programs and links

/run/weir

:   a record of each workload, and the agent's socket

/usr/share/doc/weir/docs

:   the documentation; runbook.md has a heading for each verdict, problem and error code

# SEE ALSO

**weir.hcl**(5), **weir-cni**(8)
`}, reference.ManPage{Name: "weir.hcl", Section: 5, Text: `# NAME

weir.hcl - configuration of Weir's agent and plugin

# DESCRIPTION
` + strings.Replace(reference.ManText(t, "configuration.md", "The agent"), "`pin_dir`\n\n:", "# KEYS\n\n`pin_dir`\n\n:", 1) + `
# ENVIRONMENT
` + reference.ManText(t, "configuration.md", "The environment") + `
# SEE ALSO

**weir**(1), **weir-agent**(1), **weir-config-validate**(1), **weir-cni**(8)
`}, reference.ManPage{Name: "weir-cni", Section: 8, Text: `# NAME

weir-cni - the CNI plugin of Weir

# SYNOPSIS

**consul-cni**, **weir** in Nomad's cni_path

# DESCRIPTION

A container runtime runs it, with its request in the environment (CNI_COMMAND and others) and its configuration on
standard input. **weir-install**(1) puts it into Nomad's cni_path as consul-cni, the name that Nomad calls for a
transparent_proxy block, and as weir for networks of the operator's own. Without CNI_COMMAND it prints its version. An
error has a code, which is a heading of docs/runbook.md.

# KEYS OF A CONFLIST
` + reference.ManText(t, "configuration.md", "The plugin: keys of a conflist") + `
# JOB ARGUMENTS
` + reference.ManText(t, "jobs.md", "Job arguments") + `
# SEE ALSO

**weir**(1), **weir-install**(1), **weir.hcl**(5)
`})
	reference.CheckMan(t, pages)
}

// manOf is the page of a command, of the parts of its help.
func manOf(c *base.Command, page string) string {
	var text strings.Builder
	fmt.Fprintf(&text, "# NAME\n\n%s - %s\n\n# SYNOPSIS\n\n**weir %s** %s\n\n# DESCRIPTION\n\n",
		page, plain(c.Line), c.WorkloadName, plain(strings.TrimSpace("[options] "+c.Usage)))
	for line := range strings.Lines(c.About) {
		line = strings.TrimPrefix(line, "  ")
		if !strings.HasPrefix(line, "    ") { // that is an example
			line = plain(line)
		}
		text.WriteString(line)
	}
	text.WriteString("\n\n# OPTIONS\n\n")
	c.Flags.VisitAll(func(f *flag.Flag) {
		value, usage := flag.UnquoteUsage(f)
		if value != "" {
			value = " *" + plain(value) + "*"
		}
		fmt.Fprintf(&text, "**-%s**%s\n\n:   %s\n\n", f.Name, value, plain(usage))
	})
	text.WriteString("# SEE ALSO\n\n**weir**(1)\n")
	return text.String()
}

// plain keeps Markdown from reading more into a text than it says.
func plain(text string) string {
	return strings.NewReplacer(`\`, `\\`, "*", `\*`, "_", `\_`, "`", "\\`", "[", `\[`, "]", `\]`, "<", `\<`, ">", `\>`, "|", `\|`).Replace(text)
}
