//go:build unix

package main

import (
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

const readmePatience = 5 * time.Minute // for building the commands on a busy machine

// The shell blocks of README.md do what it says, pasted one after another into a shell in a copy of the repository. Its
// ports, which other programs may have, are replaced by free ones in the page and in the files that it uses. A block of
// sh is run, and a block of text that follows is its output.
func TestReadme(t *testing.T) {
	if testing.Short() || raceEnabled() || os.Getenv("GOARCH") != "" {
		t.Skip("it builds the commands, as a reader does: neither instrumented nor for another machine")
	}
	bins := installedHAProxys(t)
	needLoopback(t)
	t.Parallel()
	dir := shortTempDir(t)
	copyTree(t, dir, "../..", freePorts(t))
	page, err := os.ReadFile(filepath.Join(dir, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	commands := readCommands(string(page))
	out := runScript(t, dir, bins[len(bins)-1].path, script(commands))
	for i, c := range commands {
		_, after, ran := strings.Cut(out, marker(i))
		have, _, whole := strings.Cut(after, marker(i+1))
		switch {
		case !ran || !whole:
			t.Fatalf("%s\nfailed, and said %q", c.text, have)
		case c.output != nil && !c.output.MatchString(have):
			t.Errorf("%s\nwant output like %q\nhave %q", c.text, c.output, have)
		}
	}
}

func raceEnabled() bool {
	info, _ := debug.ReadBuildInfo()
	return info != nil && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

func installedHAProxys(t *testing.T) []haproxyBin {
	t.Helper()
	bins, err := haproxyBins()
	_, noCurl := exec.LookPath("curl")
	switch {
	case err != nil:
		t.Fatal(err)
	case len(bins) > 0 && noCurl == nil:
	case os.Getenv("CI") != "":
		t.Fatal("haproxy or curl not found: apt-get install -y haproxy curl")
	default:
		t.Skip("haproxy or curl not found: apt-get install -y haproxy curl")
	}
	return bins
}

// freePorts returns pairs of old and new: ports of the README, and such that nobody listens to.
func freePorts(t *testing.T) []string {
	t.Helper()
	old := []int{12345, 12346, 12347, 13345, 13346, 13347, 8080}
	for range 100 {
		shift := 20000 + rand.N(10000) - old[0]
		var oldnew []string
		for _, port := range old[:6] {
			if addr := fmt.Sprintf("127.0.0.1:%d", port+shift); !take(addr) {
				break
			}
			oldnew = append(oldnew, strconv.Itoa(port), strconv.Itoa(port+shift))
		}
		if len(oldnew) == 12 {
			_, front, _ := net.SplitHostPort(freeAddr(t, "127.0.0.1"))
			return append(oldnew, strconv.Itoa(old[6]), front)
		}
	}
	t.Fatal("no free ports")
	return nil
}

// take reports whether nobody listens to addr, and no other test may.
func take(addr string) bool {
	if _, given := givenAddrs.LoadOrStore(addr, true); given {
		return false
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return false
	}
	l.Close()
	return true
}

// copyTree copies what is not hidden from root to dir, and replaces ports where the page's commands meet them.
func copyTree(t *testing.T, dir, root string, ports []string) {
	t.Helper()
	replaced := regexp.MustCompile(`^(README\.md|cmd/sp[^/]*/([^/]*\.go|haproxy/.*))$`)
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, path)
		switch {
		case err != nil:
			return err
		case d.IsDir() && name != "." && (d.Name()[0] == '.' || strings.HasPrefix(d.Name(), "testdata")):
			return filepath.SkipDir
		case d.IsDir():
			return os.MkdirAll(filepath.Join(dir, name), 0o700)
		case !d.Type().IsRegular() || strings.HasSuffix(name, "_test.go"):
			return nil
		}
		b, err := os.ReadFile(path)
		if err == nil && replaced.MatchString(name) {
			b = []byte(strings.NewReplacer(ports...).Replace(string(b)))
		}
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(dir, name), b, 0o600)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// shellCommands is a block of the page.
type shellCommands struct {
	text   string
	output *regexp.Regexp // nil: any
}

var (
	block  = regexp.MustCompile("(?ms)^```(\\w*)\n(.*?)^```$")
	spaces = regexp.MustCompile(" +")
)

func readCommands(page string) (all []shellCommands) {
	for _, m := range block.FindAllStringSubmatch(page, -1) {
		switch last := len(all) - 1; m[1] {
		case "sh":
			all = append(all, shellCommands{text: m[2]})
		case "text":
			all[last].output = outputPattern(m[2])
		}
	}
	return all
}

// outputPattern matches output like this: … stands for any text in a line, a line of three dots for any lines, and
// spaces for any number of them.
func outputPattern(output string) *regexp.Regexp {
	var b strings.Builder
	b.WriteString("^")
	for line := range strings.Lines(output) {
		if line = strings.TrimRight(line, "\n"); line == "..." {
			b.WriteString(`(?:.*\n)*`)
		} else {
			line = strings.ReplaceAll(regexp.QuoteMeta(line), "…", ".*")
			b.WriteString(spaces.ReplaceAllLiteralString(line, ` +`) + `\s*\n`)
		}
	}
	b.WriteString(`\s*$`)
	return regexp.MustCompile(b.String())
}

func marker(i int) string { return fmt.Sprintf("--- command %d\n", i) }

// script returns the commands as one script, which ends at the first that fails, and leaves nothing running.
func script(commands []shellCommands) string {
	var b strings.Builder
	b.WriteString("set -euo pipefail\n")
	b.WriteString("end() { kill -9 $(jobs -p) $(cat haproxy.pid) || true; } 2>/dev/null\n")
	b.WriteString("trap end EXIT\n")
	for i, c := range commands {
		fmt.Fprintf(&b, "echo '%s'\n%s\n", strings.TrimSpace(marker(i)), strings.TrimSpace(c.text))
	}
	fmt.Fprintf(&b, "echo '%s'\n", strings.TrimSpace(marker(len(commands))))
	return b.String()
}

// runScript runs a script with this haproxy in PATH and returns what it wrote to its standard output.
func runScript(t *testing.T, dir, haproxy, script string) string {
	t.Helper()
	bin := filepath.Join(dir, ".bin")
	if err := os.Mkdir(bin, 0o700); err != nil {
		t.Fatal(err)
	}
	wrapper := fmt.Sprintf("#!/bin/sh\nexec '%s' \"$@\"\n", haproxy)
	if err := os.WriteFile(filepath.Join(bin, "haproxy"), []byte(wrapper), 0o700); err != nil {
		t.Fatal(err)
	}
	// Files, since what runs in the background has them too, and would keep pipes open.
	out, log := createFile(t, dir, ".out"), createFile(t, dir, ".log")
	ctx, cancel := context.WithTimeout(context.Background(), readmePatience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-c", script)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = patience
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, out, log
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "SPOA_") }),
		"PATH="+bin+string(os.PathListSeparator)+os.Getenv("PATH"))
	if err := cmd.Run(); err != nil {
		said, _ := os.ReadFile(log.Name())
		t.Errorf("the commands: %v\n%s", err, said)
	}
	said, err := os.ReadFile(out.Name())
	if err != nil {
		t.Fatal(err)
	}
	return string(said)
}

func createFile(t *testing.T, dir, name string) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// Every command of the page that begins with "spoa" or "spop" has flags that exist.
func TestReadmeFlags(t *testing.T) {
	page, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(`(?m)^    spoa (-.*)$`).FindAllStringSubmatch(string(page), -1)
	if len(found) == 0 {
		t.Fatal("README.md: want commands of spoa, have none")
	}
	for _, command := range found {
		t.Run(command[1], func(t *testing.T) {
			args := strings.Fields(strings.ReplaceAll(command[1], "'", ""))
			if _, err := parse(args, nil); err != nil {
				t.Error(err)
			}
		})
	}
}

// What the pages link to in the repository exists, headings of the page included.
func TestPageLinks(t *testing.T) {
	link := regexp.MustCompile(`\]\s*\(([^)\s]+)\)`)
	for _, page := range []string{"README.md", "CHANGELOG.md", ".github/CONTRIBUTING.md", ".github/MIGRATION.md", ".github/SECURITY.md"} {
		text, err := os.ReadFile(filepath.Join("../..", page))
		if err != nil {
			t.Error(err)
			continue
		}
		anchors := headings(string(text))
		for _, m := range link.FindAllStringSubmatch(string(text), -1) {
			switch to := m[1]; {
			case strings.Contains(to, "://"):
			case to[0] == '#':
				if !slices.Contains(anchors, to) {
					t.Errorf("%s links to %s: want one of %q", page, to, anchors)
				}
			default:
				if _, err := os.Stat(filepath.Join("../..", filepath.Dir(page), to)); err != nil {
					t.Errorf("%s links to %s: %v", page, to, err)
				}
			}
		}
	}
}

// headings returns the anchors of a page's headings, as GitHub makes them.
func headings(page string) (anchors []string) {
	for _, m := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(page, -1) {
		name := regexp.MustCompile(`[^\p{L}\p{N} -]`).ReplaceAllString(strings.ToLower(m[1]), "")
		anchors = append(anchors, "#"+strings.ReplaceAll(name, " ", "-"))
	}
	return anchors
}
