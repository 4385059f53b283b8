// Package settings fills the flags of a command from its command line, its
// environment and a file, and holds the kinds of flags that commands have.
package settings

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

// Load sets flags from the command line, from the environment, and from the file
// that the flag -config names, if there is such a flag. The command line wins over
// the environment, and that over the file; what is empty counts as unset.
//
// The variable of a flag is named after the set and the flag: that of -tls-cert in
// the set spoa is SPOA_TLS_CERT. A flag made by Multi takes several values from it,
// with commas between them. A line of the file has the form "listen 127.0.0.1:12345".
//
// An error names the source, the flag, the value and what is wanted; it is
// flag.ErrHelp if the command line asks for help. Notes are what is odd but no
// error.
func Load(flags *flag.FlagSet, args, environ []string) (notes []string, err error) {
	l := &loader{flags: flags, prefix: strings.ToUpper(flags.Name()) + "_"}
	err = l.load(args, environ)
	return l.notes, err
}

// Given reports whether Load or a caller of Set has set the flag of that name.
func Given(flags *flag.FlagSet, name string) (given bool) {
	flags.Visit(func(f *flag.Flag) { given = given || f.Name == name })
	return given
}

// loader is one call of Load.
type loader struct {
	flags  *flag.FlagSet
	prefix string          // of variables
	given  map[string]bool // flags that an earlier source has set
	notes  []string
}

// variable returns the name of the variable for a flag.
func (l *loader) variable(flag string) string {
	return l.prefix + strings.ReplaceAll(strings.ToUpper(flag), "-", "_")
}

// counted is a flag that knows how often it was set.
type counted struct {
	flag.Value
	n int
}

// Set implements flag.Value.
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
func (l *loader) load(args, environ []string) error {
	l.flags.VisitAll(func(f *flag.Flag) { f.Value = &counted{Value: f.Value} })
	if err := l.flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		return fmt.Errorf("command line: %w", err)
	}
	if l.flags.NArg() > 0 {
		return fmt.Errorf("command line: unexpected argument %q: want flags only", l.flags.Arg(0))
	}
	l.close("on the command line")
	if err := l.environment(environ); err != nil {
		return err
	}
	l.close("")
	config := l.flags.Lookup("config")
	if config == nil || config.Value.String() == "" {
		return nil
	}
	path := config.Value.String()
	if err := l.file(path); err != nil {
		return err
	}
	l.close("in " + path)
	return nil
}

// close protects the flags that are set from later sources.
func (l *loader) close(where string) {
	l.given = make(map[string]bool)
	l.flags.Visit(func(f *flag.Flag) {
		l.given[f.Name] = true
		c := f.Value.(*counted)
		if _, ok := c.Value.(multi); !ok && c.n > 1 {
			l.notes = append(l.notes, fmt.Sprintf("-%s is given %d times %s: the last one counts", f.Name, c.n, where))
		}
		c.n = 0
	})
}

// set sets a flag from the source that is being read.
func (l *loader) set(name, value string) error {
	err := l.flags.Set(name, value)
	if err != nil && l.flags.Lookup(name).Value.(*counted).IsBoolFlag() {
		return errors.New("want true or false")
	}
	return err
}

// environment sets flags from variables. An empty one counts as unset.
func (l *loader) environment(environ []string) error {
	names := make(map[string]*flag.Flag)
	l.flags.VisitAll(func(f *flag.Flag) { names[l.variable(f.Name)] = f })
	for _, variable := range slices.Sorted(slices.Values(environ)) {
		name, value, _ := strings.Cut(variable, "=")
		if !strings.HasPrefix(name, l.prefix) || value == "" {
			continue
		}
		f := names[name]
		switch {
		case f == nil && !foreign(strings.TrimPrefix(name, l.prefix), value):
			if err := l.unknown(name); err != nil {
				return err
			}
			continue
		case f == nil || l.given[f.Name]:
			continue
		}
		values := []string{value}
		if _, ok := f.Value.(*counted).Value.(multi); ok {
			values = strings.Split(value, ",")
		}
		for _, v := range values {
			if err := l.set(f.Name, v); err != nil {
				return fmt.Errorf("environment: %s=%s: %w", name, v, err)
			}
		}
	}
	return nil
}

// unknown refuses a variable that is a flag's with a slip in it, and notes any
// other.
func (l *loader) unknown(name string) error {
	var all []string
	l.flags.VisitAll(func(f *flag.Flag) { all = append(all, strings.TrimPrefix(l.variable(f.Name), l.prefix)) })
	if near := nearest(strings.TrimPrefix(name, l.prefix), all); near != "" {
		return fmt.Errorf("environment: no flag has the variable %s: the nearest is %s%s", name, l.prefix, near)
	}
	l.notes = append(l.notes, fmt.Sprintf("environment: no flag has the variable %s, it is ignored", name))
	return nil
}

// links are the variables that Kubernetes makes for services, and Docker for
// links, whose names begin with that of the command, without this beginning.
var links = regexp.MustCompile(`^([A-Z0-9_]+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?|NAME|ENV_\w+)$`)

// foreign reports whether a variable, named without its prefix, is known to be of
// another meaning.
func foreign(name, value string) bool {
	if (name == "PORT" || strings.HasSuffix(name, "_PORT")) && !strings.Contains(name, "SERVICE") && !strings.Contains(name, "_TCP_") {
		return strings.Contains(value, "://")
	}
	return links.MatchString(name) || strings.HasPrefix(name, "TEST_")
}

// file sets flags from a file of lines such as "listen 127.0.0.1:12345".
func (l *loader) file(path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("-config: %w", err)
	}
	lines := bufio.NewScanner(bytes.NewReader(bytes.TrimPrefix(b, []byte("\ufeff"))))
	for n := 1; lines.Scan(); n++ {
		if err := l.line(strings.TrimSpace(lines.Text())); err != nil {
			return fmt.Errorf("%s:%d: %w", path, n, err)
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

func (l *loader) line(line string) error {
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
	f := l.flags.Lookup(name)
	switch {
	case f == nil:
		return l.noFlag(name)
	case name == "config":
		return errors.New("config: a file cannot name another")
	case l.given[name]:
		return nil
	case len(value) > 1 && (value[0] == '"' || value[0] == '\'') && value[len(value)-1] == value[0]:
		return fmt.Errorf("%s %s: want the value without quotes", name, value)
	}
	if err := l.set(name, value); err != nil {
		return fmt.Errorf("%s %s: %w", name, value, err)
	}
	return nil
}

func (l *loader) noFlag(name string) error {
	var all []string
	l.flags.VisitAll(func(f *flag.Flag) { all = append(all, f.Name) })
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
