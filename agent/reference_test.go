// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/agent/server"
	"github.com/weirmesh/weir/test/reference"
)

// TestReferenceOfConfiguration holds docs/configuration.md to the fields of Config, their comments
// and their defaults.
func TestReferenceOfConfiguration(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "configfile/config.go", nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	comments := make(map[string]string) // by type.field
	ast.Inspect(file, func(node ast.Node) bool {
		spec, ok := node.(*ast.TypeSpec)
		if !ok {
			return true
		}
		if fields, ok := spec.Type.(*ast.StructType); ok {
			for _, field := range fields.Fields.List {
				comments[spec.Name.Name+"."+field.Names[0].Name] = strings.TrimSpace(field.Comment.Text())
			}
		}
		return true
	})
	rows := [][]string{{"key", "type", "default", "meaning"}}
	var describe func(prefix string, value reflect.Value)
	describe = func(prefix string, value reflect.Value) {
		for i := range value.NumField() {
			field := value.Type().Field(i)
			key, kind, _ := strings.Cut(field.Tag.Get("hcl"), ",")
			if kind == "block" {
				describe(prefix+key+".", value.Field(i).Elem())
				continue
			}
			comment := comments[value.Type().Name()+"."+field.Name]
			if comment == "" {
				t.Errorf("%s.%s: want a comment that says what it means", value.Type().Name(), field.Name)
			}
			given, err := json.Marshal(value.Field(i).Interface())
			if err != nil {
				t.Fatal(err)
			}
			rows = append(rows, []string{"`" + prefix + key + "`", typeName(field.Type), "`" + string(given) + "`", comment})
		}
	}
	describe("", reflect.ValueOf(configfile.DefaultConfig()))
	reference.Check(t, "configuration.md", "agent-keys", reference.Table(rows))
}

func typeName(t reflect.Type) string {
	switch t.Kind() { //nolint:exhaustive // all others are named as they are
	case reflect.Slice:
		return "list of " + typeName(t.Elem()) + "s"
	case reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64, reflect.Int, reflect.Int64:
		return "number"
	default:
		return t.Kind().String()
	}
}

// TestReferenceOfMetrics holds docs/metrics.md to what the agent exports.
func TestReferenceOfMetrics(t *testing.T) {
	// The library tells of a description nothing but its text.
	parts := regexp.MustCompile(`^Desc\{fqName: "(.*)", help: "(.*?)"(?:, unit: ".*")?, constLabels: \{.*\}, variableLabels: \{(.*)\}\}$`)
	rows := [][]string{{"metric", "type", "labels", "meaning"}}
	for _, description := range server.Metrics() {
		found := parts.FindStringSubmatch(description.String())
		if found == nil {
			t.Fatalf("%s: not what the library used to say of a description", description)
		}
		kind, labels := "gauge", ""
		if strings.HasSuffix(found[1], "_total") {
			kind = "counter"
		}
		if found[1] == "weir_consul_apply_seconds" {
			kind = "histogram"
		}
		if found[3] != "" {
			labels = "`" + strings.ReplaceAll(found[3], ",", "`, `") + "`"
		}
		rows = append(rows, []string{fmt.Sprintf("`%s`", found[1]), kind, labels, strings.ReplaceAll(found[2], `\"`, `"`)})
	}
	reference.Check(t, "metrics.md", "metrics", reference.Table(rows))
}
