// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/host"
)

// Each code has a name of its own, a severity and a title.
func TestProblemCodes(t *testing.T) {
	names := make(map[string]bool)
	for _, code := range health.AllProblemCodes() {
		name := code.String()
		if names[name] || !regexp.MustCompile(`^[a-z0-9]+([-_][a-z0-9]+)*$`).MatchString(name) {
			t.Errorf("code %d has the name %q, want one of its own in lower case", code, name)
		}
		names[name] = true
		if severity := code.Severity(); severity != health.SeverityError && severity != health.SeverityWarning || code.Title() == "" {
			t.Errorf("code %s has severity %q and title %q", name, severity, code.Title())
		}
	}
	defer func() {
		if recover() == nil {
			t.Error("a code that is not in the table makes a problem")
		}
	}()
	health.NewProblem(health.ProblemMax, "", "")
}

func TestProblemJSON(t *testing.T) {
	problem := health.NewProblem(health.ProblemTableFull, "stop some", "it is full").Of("workload a-eth0", "a")
	text, err := json.Marshal(problem)
	want := `{"code":"table-full","severity":"warning","subject":"workload a-eth0","alloc_id":"a","what":"it is full","remedy":"stop some"}`
	if err != nil || string(text) != want {
		t.Errorf("JSON is %s, %v; want %s", text, err, want)
	}
	var again health.Problem
	if err := json.Unmarshal(text, &again); err != nil || again != problem {
		t.Errorf("read again it is %+v, %v; want %+v", again, err, problem)
	}
	if got, want := problem.String(), "workload a-eth0: it is full [table-full]; remedy: stop some"; got != want {
		t.Errorf("in a line it is %q, want %q", got, want)
	}
}

// Only NewProblem makes problems, so each of them has a code of the table.
func TestEachProblemHasACode(t *testing.T) {
	made := 0
	err := filepath.WalkDir("..", func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if hidden := strings.HasPrefix(entry.Name(), ".") && entry.Name() != ".."; hidden && entry.IsDir() {
			return filepath.SkipDir
		}
		if entry.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") || path == "../redirect/health/problem.go" {
			return nil
		}
		files := token.NewFileSet()
		file, err := parser.ParseFile(files, path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(node ast.Node) bool {
			switch node := node.(type) {
			case *ast.CompositeLit:
				if isProblem(node.Type) && len(node.Elts) > 0 {
					t.Errorf("%s: a problem that NewProblem does not make", files.Position(node.Pos()))
				}
				list, ok := node.Type.(*ast.ArrayType)
				for _, element := range node.Elts {
					literal, untyped := element.(*ast.CompositeLit)
					if ok && isProblem(list.Elt) && untyped && literal.Type == nil {
						t.Errorf("%s: a problem that NewProblem does not make", files.Position(node.Pos()))
					}
				}
			case *ast.CallExpr:
				if name, ok := node.Fun.(*ast.SelectorExpr); ok && name.Sel.Name == "NewProblem" {
					made++
				}
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if made < 20 {
		t.Errorf("%d calls of redirect.NewProblem were found: fewer than there are", made)
	}
}

func isProblem(expression ast.Expr) bool {
	if name, ok := expression.(*ast.SelectorExpr); ok {
		expression = name.Sel
	}
	name, ok := expression.(*ast.Ident)
	return ok && name.Name == "Problem"
}

// A name with a line end in it, such as a job's, makes no line of its own.
func TestProblemIsOneLine(t *testing.T) {
	problem := health.NewProblem(health.ProblemStepFailed, "look", "first\nsecond").Of("allocation x (job\nhealthy: 3 workloads/g)", "x")
	if got, want := problem.Text(), "allocation x (job; healthy: 3 workloads/g): first; second [step-failed]"; got != want {
		t.Errorf("the problem is %q, want %q", got, want)
	}
}

// A process names itself.
func TestCommandIsQuotedWhereItIsNotPrinted(t *testing.T) {
	const own = "/proc/self/comm"
	before, err := os.ReadFile(own)
	if err != nil {
		t.Fatal(err)
	}
	rename := func(name string) {
		if err := os.WriteFile(own, []byte(name), 0); err != nil {
			t.Fatal(err)
		}
	}
	defer rename(strings.TrimSpace(string(before)))
	for name, want := range map[string]string{"envoy": "envoy", "a b": "a b", "x\x1b[2J\nfine": `"x\x1b[2J\nfine"`} {
		if rename(name); host.CommandOf(os.Getpid()) != want {
			t.Errorf("a process named %q is told as %s, want %s", name, host.CommandOf(os.Getpid()), want)
		}
	}
}
