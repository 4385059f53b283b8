package main

import (
	"bufio"
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
)

// settings sets flags from the command line, the environment and a file. The
// command line wins over the environment, and that over the file.
type settings struct {
	flags *flag.FlagSet
	given map[string]bool // flags that an earlier source has set
	notes []string        // what is odd but no error
}

const envPrefix = "SPOA_"

// envName returns the name of the variable for a flag.
func envName(flag string) string {
	return envPrefix + strings.ReplaceAll(strings.ToUpper(flag), "-", "_")
}

// multi marks a flag that collects its values.
type multi struct{ flag.Value }

// counted is a flag that knows how often it was set.
type counted struct {
	flag.Value
	n int
}

func (c *counted) Set(s string) error {
	c.n++
	return c.Value.Set(s)
}

// IsBoolFlag makes package flag take a boolean without a value.
func (c *counted) IsBoolFlag() bool {
	b, ok := c.Value.(interface{ IsBoolFlag() bool })
	return ok && b.IsBoolFlag()
}

// load sets the flags from all sources.
func (s *settings) load(args, environ []string) error {
	s.flags.VisitAll(func(f *flag.Flag) { f.Value = &counted{Value: f.Value} })
	if err := s.flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		return fmt.Errorf("command line: %w", err)
	}
	if s.flags.NArg() > 0 {
		return fmt.Errorf("command line: unexpected argument %q: want flags only", s.flags.Arg(0))
	}
	s.close("on the command line")
	if err := s.environment(environ); err != nil {
		return err
	}
	s.close("")
	path := s.flags.Lookup("config").Value.String()
	if path == "" {
		return nil
	}
	if err := s.file(path); err != nil {
		return err
	}
	s.close("in " + path)
	return nil
}

// close protects the flags that are set from later sources.
func (s *settings) close(where string) {
	s.given = make(map[string]bool)
	s.flags.Visit(func(f *flag.Flag) {
		s.given[f.Name] = true
		c := f.Value.(*counted)
		if _, ok := c.Value.(multi); !ok && c.n > 1 {
			s.notes = append(s.notes, fmt.Sprintf("-%s is given %d times %s: the last one counts", f.Name, c.n, where))
		}
		c.n = 0
	})
}

// set sets a flag from the source that is being read.
func (s *settings) set(name, value string) error {
	err := s.flags.Set(name, value)
	if err != nil && s.flags.Lookup(name).Value.(*counted).IsBoolFlag() {
		return errors.New("want true or false")
	}
	return err
}

// environment sets flags from variables. An empty one counts as unset.
func (s *settings) environment(environ []string) error {
	names := make(map[string]*flag.Flag)
	s.flags.VisitAll(func(f *flag.Flag) { names[envName(f.Name)] = f })
	slices.Sort(environ)
	for _, variable := range environ {
		name, value, _ := strings.Cut(variable, "=")
		if !strings.HasPrefix(name, envPrefix) || value == "" {
			continue
		}
		f := names[name]
		switch {
		case f == nil && !foreign(name, value):
			if err := s.unknown(name); err != nil {
				return err
			}
			continue
		case f == nil || s.given[f.Name]:
			continue
		}
		values := []string{value}
		if _, ok := f.Value.(*counted).Value.(multi); ok {
			values = strings.Split(value, ",")
		}
		for _, v := range values {
			if err := s.set(f.Name, v); err != nil {
				return fmt.Errorf("environment: %s=%s: %w", name, v, err)
			}
		}
	}
	return nil
}

// unknown refuses a variable that is a flag's with a slip in it, and notes any
// other.
func (s *settings) unknown(name string) error {
	var all []string
	s.flags.VisitAll(func(f *flag.Flag) { all = append(all, strings.TrimPrefix(envName(f.Name), envPrefix)) })
	if near := nearest(strings.TrimPrefix(name, envPrefix), all); near != "" {
		return fmt.Errorf("environment: no flag has the variable %s: the nearest is %s%s", name, envPrefix, near)
	}
	s.notes = append(s.notes, fmt.Sprintf("environment: no flag has the variable %s, it is ignored", name))
	return nil
}

// links are the variables that Kubernetes makes for services, and Docker for
// links, whose names begin with spoa.
var links = regexp.MustCompile(`^SPOA_([A-Z0-9_]+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?|NAME|ENV_\w+)$`)

// foreign reports whether a variable is known to be of another meaning.
func foreign(name, value string) bool {
	if strings.HasSuffix(name, "_PORT") && !strings.Contains(name, "SERVICE") && !strings.Contains(name, "_TCP_") {
		return strings.Contains(value, "://")
	}
	return links.MatchString(name) || strings.HasPrefix(name, "SPOA_TEST_")
}

// file sets flags from a file of lines such as "listen 127.0.0.1:12345".
func (s *settings) file(path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("-config: %w", err)
	}
	lines := bufio.NewScanner(bytes.NewReader(bytes.TrimPrefix(b, []byte("\ufeff"))))
	for n := 1; lines.Scan(); n++ {
		if err := s.line(strings.TrimSpace(lines.Text())); err != nil {
			return fmt.Errorf("%s:%d: %w", path, n, err)
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

func (s *settings) line(line string) error {
	if line == "" || line[0] == '#' {
		return nil
	}
	name, value := strings.TrimLeft(line, "-"), "true"
	if i := strings.IndexAny(name, " \t=:"); i >= 0 {
		separator, form := name[i], strings.TrimSpace(name[i:])
		name, value = name[:i], strings.TrimLeft(form, "=: \t")
		if form[0] == '=' || strings.HasPrefix(form, ": ") || separator == ':' {
			return fmt.Errorf("%q: want \"%s %s\", without = or colon", line, name, value)
		}
		value = form
	}
	if i := strings.Index(value, " #"); i >= 0 {
		value = strings.TrimSpace(value[:i])
	}
	f := s.flags.Lookup(name)
	switch {
	case f == nil:
		return s.noFlag(name)
	case name == "config":
		return errors.New("config: a file cannot name another")
	case s.given[name]:
		return nil
	case len(value) > 1 && (value[0] == '"' || value[0] == '\'') && value[len(value)-1] == value[0]:
		return fmt.Errorf("%s %s: want the value without quotes", name, value)
	}
	if err := s.set(name, value); err != nil {
		return fmt.Errorf("%s %s: %w", name, value, err)
	}
	return nil
}

func (s *settings) noFlag(name string) error {
	var all []string
	s.flags.VisitAll(func(f *flag.Flag) { all = append(all, f.Name) })
	if near := nearest(name, all); near != "" {
		return fmt.Errorf("no flag %q: the nearest is %s", name, near)
	}
	return fmt.Errorf("no flag %q", name)
}

// nearest returns the name that differs from s in the fewest letters, if these
// are so few that it is likely to be meant.
func nearest(s string, names []string) string {
	best, most := "", min(2, len(s)/3)
	for _, name := range names {
		if d := distance(s, name); d <= most {
			best, most = name, d-1
		}
	}
	return best
}

// distance returns how many letters have to be inserted, deleted or replaced to
// make a of b (Levenshtein).
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j+1]+1, row[j]+1)
		}
	}
	return row[len(b)]
}
