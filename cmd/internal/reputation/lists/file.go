package lists

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// File is a list as a flag names it.
type File struct {
	Path   string // a file, a directory, a glob, a URL (https or http), or "-" for standard input
	Score  uint8  // of entries that bring no score of their own
	Column Column // what a number behind an address is
	Field  string // the field of CSV or JSON that holds this number
	Accept Accept // faults that do not keep the list from coming into force
}

func (f File) url() bool {
	return strings.HasPrefix(f.Path, "https://") || strings.HasPrefix(f.Path, "http://")
}

// Files is a flag.Value that collects block lists:
//
//	PATH[=SCORE][,column=KIND][,field=NAME][,accept=FAULT+FAULT]
//
// KIND is what ParseColumn takes and FAULT what ParseAccept takes. An option
// alone belongs to the list before it, because ff splits the environment's
// SPOA_REPUTATION at commas.
type Files []File

// AllowFiles is a flag.Value that collects allow lists: PATH[,accept=FAULT+FAULT].
// KIND can be ignore or count>=N, too.
type AllowFiles []File

func (f *Files) String() string      { return filesString(*f) }
func (f *AllowFiles) String() string { return filesString(*f) }

func filesString(files []File) string {
	var all []string
	for _, f := range files {
		s := fmt.Sprintf("%s=%d", f.Path, f.Score)
		if f.Column.Kind != 0 {
			s += ",column=" + f.Column.String()
		}
		if f.Field != "" {
			s += ",field=" + f.Field
		}
		if f.Accept != 0 {
			s += ",accept=" + f.Accept.String()
		}
		all = append(all, s)
	}
	return strings.Join(all, ",")
}

// Set takes what follows the last equals sign for a score if it is a number.
// Anything else there belongs to the path, provided there is such a file.
func (f *Files) Set(s string) error {
	file, err := setFile((*[]File)(f), s)
	if file == nil || err != nil {
		return err
	}
	if path, score, ok := cutScore(file.Path); ok {
		n, err := parseScore(score)
		_, nan := strconv.Atoi(score)
		switch {
		case err == nil:
			file.Path, file.Score = path, n
		case nan == nil || !file.url() && !exists(file.Path):
			return fmt.Errorf("want FILE or FILE=SCORE: %w", err)
		}
	}
	if file.Path == "" {
		return errors.New("want FILE or FILE=SCORE: no file named")
	}
	*f = append(*f, *file)
	return nil
}

// Set takes the whole of s, less its options, for the path.
func (f *AllowFiles) Set(s string) error {
	file, err := setFile((*[]File)(f), s)
	if file == nil || err != nil {
		return err
	}
	switch {
	case file.Path == "":
		return errors.New("no file named")
	case file.Column.Kind == ColumnScore || file.Column.Kind == ColumnBadness:
		return errScoreAllowed
	}
	file.Score = BestScore
	*f = append(*f, *file)
	return nil
}

// setFile cuts the options from s. It returns nil if s is nothing but options,
// which then belong to the last file.
func setFile(files *[]File, s string) (*File, error) {
	file, options := new(File), []string(nil)
	for {
		i := strings.LastIndexByte(s, ',')
		key, _, ok := strings.Cut(s[i+1:], "=")
		if !ok || key != "column" && key != "field" && key != "accept" {
			break
		}
		options = append(options, s[i+1:])
		if s = s[:max(i, 0)]; i < 0 {
			if len(*files) == 0 {
				return nil, fmt.Errorf("%s: want a list before it", options[0])
			}
			file = &(*files)[len(*files)-1]
			break
		}
	}
	for _, o := range options {
		if err := file.option(o); err != nil {
			return nil, err
		}
	}
	if s == "" && len(options) > 0 {
		return nil, nil
	}
	file.Path = s
	return file, nil
}

// option sets one of the options that a flag, and for the first two a comment in
// the list itself, can name.
func (f *File) option(s string) (err error) {
	key, value, _ := strings.Cut(s, "=")
	switch key {
	case "column":
		f.Column, err = ParseColumn(value)
	case "field":
		if f.Field = value; value == "" {
			err = errors.New("field: want the name of a field of CSV or JSON")
		}
	case "accept":
		f.Accept, err = ParseAccept(value)
	default:
		err = fmt.Errorf("%.60q: want column=KIND or field=NAME", s)
	}
	return err
}

// cutScore cuts the last equals sign and what follows. In a URL with a query it
// must be one more than the query's last parameter has of its own.
func cutScore(path string) (before, score string, ok bool) {
	i := strings.LastIndexByte(path, '=')
	if i < 0 {
		return "", "", false
	}
	before, score = path[:i], path[i+1:]
	if (File{Path: path}).url() {
		if q := strings.LastIndexAny(before, "?&"); q >= 0 && !strings.Contains(before[q:], "=") {
			return "", "", false
		}
	}
	return before, score, true
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

var (
	errScore        = fmt.Errorf("a score is an integer from 0 to %d", BestScore)
	errScoreAllowed = errors.New("a score on an allow list: want column=ignore, or column=count>=N")
)

func parseScore(s string) (uint8, error) {
	n, err := strconv.ParseUint(s, 10, 8)
	if err != nil || n > BestScore {
		return 0, errScore
	}
	return uint8(n), nil
}

// ColumnKind is what a number behind an address means.
type ColumnKind uint8

const (
	ColumnUnsaid  ColumnKind = iota // not said: numbers are not used, and a warning says so
	ColumnIgnore                    // nothing, nor does anything else behind the address
	ColumnScore                     // the entry's score, 0 the worst to 100
	ColumnBadness                   // the contrary of a score, 100 the worst, as of AbuseIPDB's confidence
	ColumnCount                     // a count; the list has the addresses that reach Min
)

// Column says what a number behind an address means.
type Column struct {
	Kind ColumnKind
	Min  uint64 // of ColumnCount
}

func (c Column) String() string {
	switch c.Kind {
	case ColumnIgnore:
		return "ignore"
	case ColumnScore:
		return "score"
	case ColumnBadness:
		return "badness"
	case ColumnCount:
		return fmt.Sprintf("count>=%d", c.Min)
	}
	return ""
}

const columnKinds = "score (0 is worst), badness (100 is worst), count>=N (listed from N on; quote it for the shell) or ignore"

// ParseColumn parses score, badness, count>=N or ignore.
func ParseColumn(s string) (Column, error) {
	switch s {
	case "score":
		return Column{Kind: ColumnScore}, nil
	case "badness":
		return Column{Kind: ColumnBadness}, nil
	case "ignore":
		return Column{Kind: ColumnIgnore}, nil
	}
	if n, ok := strings.CutPrefix(s, "count>="); ok {
		if least, err := strconv.ParseUint(n, 10, 63); err == nil {
			return Column{ColumnCount, least}, nil
		}
	}
	return Column{}, fmt.Errorf("column=%.60s: want %s", s, columnKinds)
}

// judge returns the score of an entry of a list with that score, and whether the
// list has it at all. The number is empty if there is none.
func (c Column) judge(score uint8, number []byte) (uint8, bool, error) {
	switch {
	case c.Kind == ColumnCount:
		n, err := strconv.ParseUint(string(number), 10, 64)
		if err != nil {
			return 0, false, fmt.Errorf("%.60q behind the address: want a count", number)
		}
		return score, n >= c.Min, nil
	case c.Kind != ColumnScore && c.Kind != ColumnBadness || len(number) == 0:
		return score, true, nil
	}
	n, err := parseScore(string(number))
	if err != nil {
		return 0, false, fmt.Errorf("%.60q behind the address: %w", number, err)
	}
	if c.Kind == ColumnBadness {
		n = BestScore - n
	}
	return n, true, nil
}

// Accept is a set of faults for which a list is refused unless its flag says
// otherwise.
type Accept uint8

const (
	AcceptCut    Accept = 1 << iota // it ends early, or has fewer entries than it says
	AcceptWide                      // it has a prefix that no feed has by intention
	AcceptShrunk                    // it has less than half the entries that it had
)

var acceptNames = []struct {
	accept Accept
	name   string
}{{AcceptCut, "cut"}, {AcceptWide, "wide"}, {AcceptShrunk, "shrunk"}}

func (a Accept) String() string {
	var names []string
	for _, n := range acceptNames {
		if a&n.accept != 0 {
			names = append(names, n.name)
		}
	}
	return strings.Join(names, "+")
}

// ParseAccept parses cut, wide, shrunk, or several of them with plus signs
// between.
func ParseAccept(s string) (a Accept, err error) {
next:
	for name := range strings.SplitSeq(s, "+") {
		for _, n := range acceptNames {
			if n.name == name {
				a |= n.accept
				continue next
			}
		}
		return 0, fmt.Errorf("accept=%.60s: want cut, wide, shrunk, or several as in cut+wide", s)
	}
	return a, nil
}
