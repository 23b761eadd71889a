// SPDX-License-Identifier: MPL-2.0

package request

import (
	"errors"
	"fmt"
	"os"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/zclconf/go-cty/cty/convert"
	"github.com/zclconf/go-cty/cty/gocty"
)

// readFile reads what a file of the agent's says of the policy. All else in it
// is the agent's to check. It does by hand what package gohcl does with tags:
// that one links in a writer and a comparer, whose start every call would pay.
func (p *policy) readFile(path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read policy: %w", err)
	}
	file, problems := hclsyntax.ParseConfig(text, path, hcl.InitialPos)
	if problems.HasErrors() {
		return firstOf(problems)
	}
	plugin, err := attributes(file.Body, "cni", "job_args", "consul_exclusions")
	if err != nil {
		return err
	}
	proxy, err := attributes(file.Body, "proxy", "default_uid")
	if err != nil {
		return err
	}
	var jobArgs []string
	if err := decodeAttribute(plugin["job_args"], &jobArgs); err != nil {
		return err
	}
	if jobArgs != nil {
		p.jobArgs, p.source = jobArgs, "job_args of "+path
	}
	return errors.Join(
		decodeAttribute(plugin["consul_exclusions"], &p.consulExclusions),
		decodeAttribute(proxy["default_uid"], &p.proxyUID))
}

// attributes are those of a block that may be there once. Others are left out.
func attributes(body hcl.Body, block string, names ...string) (hcl.Attributes, error) {
	content, _, problems := body.PartialContent(&hcl.BodySchema{Blocks: []hcl.BlockHeaderSchema{{Type: block}}})
	if problems.HasErrors() {
		return nil, firstOf(problems)
	}
	switch len(content.Blocks) {
	case 0:
		return nil, nil
	case 1:
	default:
		return nil, fmt.Errorf("%s: block %s is there twice", content.Blocks[1].DefRange, block)
	}
	schema := new(hcl.BodySchema)
	for _, name := range names {
		schema.Attributes = append(schema.Attributes, hcl.AttributeSchema{Name: name})
	}
	content, _, problems = content.Blocks[0].Body.PartialContent(schema)
	if problems.HasErrors() {
		return nil, firstOf(problems)
	}
	return content.Attributes, nil
}

// decodeAttribute leaves the target as it is where the attribute is not there,
// or null.
func decodeAttribute(attribute *hcl.Attribute, target any) error {
	if attribute == nil {
		return nil
	}
	value, problems := attribute.Expr.Value(nil)
	if problems.HasErrors() {
		return firstOf(problems)
	}
	if value.IsNull() {
		return nil
	}
	kind, err := gocty.ImpliedType(target)
	if err == nil {
		value, err = convert.Convert(value, kind)
	}
	if err == nil {
		err = gocty.FromCtyValue(value, target)
	}
	if err != nil {
		return fmt.Errorf("%s: %s: %w", attribute.Range, attribute.Name, err)
	}
	return nil
}

func firstOf(problems hcl.Diagnostics) error {
	return errors.New(problems.Errs()[0].Error())
}
