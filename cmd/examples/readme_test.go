package examples

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// programs matches the Go programs of a page.
var programs = regexp.MustCompile("(?ms)^```go\n(package main\n.*?)^```$")

// The programs in the README and in MIGRATION.md compile as they stand there, and
// the test among them passes.
func TestPages(t *testing.T) {
	for page, want := range map[string]int{"README.md": 5, ".github/MIGRATION.md": 1} {
		text, err := os.ReadFile(filepath.Join("..", "..", page))
		if err != nil {
			t.Fatal(err)
		}
		found := programs.FindAllStringSubmatch(string(text), -1)
		if len(found) != want {
			t.Errorf("%s: want %d programs, have %d", page, want, len(found))
		}
		var dir string
		for i, program := range found {
			name := "main_test.go" // of the program before
			isTest := strings.Contains(program[1], `"testing"`)
			if !isTest {
				// Beside this file, so that the modules are those of this one.
				if dir, err = os.MkdirTemp(".", "testdata-"+strconv.Itoa(i)+"-"); err != nil {
					t.Fatal(err)
				}
				defer os.RemoveAll(dir)
				name = "main.go"
			}
			if err := os.WriteFile(filepath.Join(dir, name), []byte(program[1]), 0o600); err != nil {
				t.Fatal(err)
			}
			verb := "vet"
			if isTest {
				verb = "test"
			}
			if out, err := exec.Command("go", verb, "./"+dir).CombinedOutput(); err != nil {
				t.Errorf("%s, program %d: go %s: %v\n%s", page, i, verb, err, out)
			}
		}
	}
}
