// Package lists holds block lists and allow lists of addresses, read from files
// that may change at any time.
package lists

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/gaissmai/bart"
	"github.com/go-kit/log"
	"github.com/go-kit/log/level"
)

// BestScore is the score of an address that is allowed or on no list.
const BestScore = 100

const maxReported = 5 // bad lines of a file that are logged one by one

// privateRanges are often on block lists as bogons, and often where clients come from.
var privateRanges = []netip.Prefix{
	netip.MustParsePrefix("10.0.0.0/8"),
	netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("172.16.0.0/12"),
	netip.MustParsePrefix("192.168.0.0/16"),
	netip.MustParsePrefix("::1/128"),
	netip.MustParsePrefix("fc00::/7"),
}

var errScore = fmt.Errorf("a score is an integer from 0 to %d", BestScore)

// File names a reputation list.
type File struct {
	Path  string
	Score uint8 // of entries that bring no score of their own
}

// Files is a flag.Value that collects FILE[=SCORE].
type Files []File

// String implements flag.Value.
func (f *Files) String() string {
	var b strings.Builder
	for i, file := range *f {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, "%s=%d", file.Path, file.Score)
	}
	return b.String()
}

// Set implements flag.Value. It takes what follows the last equals sign for a score if it is a number. Anything else there belongs to the
// file's name, provided there is such a file.
func (f *Files) Set(s string) error {
	file := File{Path: s}
	if i := strings.LastIndexByte(s, '='); i >= 0 {
		score, err := parseScore(s[i+1:])
		_, nan := strconv.Atoi(s[i+1:])
		switch {
		case err == nil:
			file = File{Path: s[:i], Score: score}
		case nan == nil || !exists(s):
			return fmt.Errorf("want FILE or FILE=SCORE: %w", err)
		}
	}
	if file.Path == "" {
		return errors.New("want FILE or FILE=SCORE: no file named")
	}
	*f = append(*f, file)
	return nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func parseScore(s string) (uint8, error) {
	n, err := strconv.ParseUint(s, 10, 8)
	if err != nil || n > BestScore {
		return 0, errScore
	}
	return uint8(n), nil
}

// Lists answers which score an address has, from files that may change at any time. Lookups never wait for a reload:
// a new table is built aside and takes the place of the old one at once.
type Lists struct {
	logger   log.Logger
	onReload func(list string, ok bool) // if not nil, told of every reload, after it took effect; set before Watch and Reload

	poll   time.Duration // how often files are looked at without being told of a change
	settle time.Duration // how long a changed file must stay as it is before it is read

	table   atomic.Pointer[table]
	mu      sync.Mutex // one load at a time; guards the sources' unexported state
	sources []*source  // the slice, and each one's File, name and allow, never change
	allows  bool       // there is an allow list
}

// table is what is in force, built once and then only read.
type table struct {
	allow  bart.Lite
	scores bart.Table[verdict]
}

type verdict struct {
	list  int32 // index into sources
	score uint8
}

// source is a file and what was last read from it.
type source struct {
	File
	name    string
	allow   bool
	entries []entry
	tried   os.FileInfo // as it was when last read, successfully or not; nil if missing
	seen    os.FileInfo // as it was at the last look
	stats   atomic.Pointer[Stats]
}

// Stats describes a list and its file for metrics.
type Stats struct {
	Name     string
	File     string
	Allow    bool
	Entries  int       // distinct prefixes in force
	BadLines int       // left out of them
	Loaded   time.Time // when the content in force was read
	Modified time.Time // modification time of the file it was read from
	Reloads  uint64    // that succeeded; the load at start is none
	Failures uint64    // reloads after which the previous content stayed in force
}

// Open loads all files, or fails naming each one that cannot be used. Allow lists win over all others, whatever
// the length of the prefixes.
func Open(logger log.Logger, reputation []File, allow []string) (*Lists, error) {
	l := &Lists{logger: logger, poll: 10 * time.Second, settle: 100 * time.Millisecond, allows: len(allow) > 0}
	for _, f := range reputation {
		l.sources = append(l.sources, &source{File: f, name: listName(f.Path)})
	}
	for _, path := range allow {
		l.sources = append(l.sources, &source{File: File{Path: path, Score: BestScore}, name: listName(path), allow: true})
	}
	for _, s := range l.sources {
		s.stats.Store(&Stats{Name: s.name, File: s.Path, Allow: s.allow})
	}
	l.table.Store(new(table))
	if err := l.Reload(); err != nil {
		return nil, err
	}
	return l, nil
}

// listName is the base name of path without its extension.
func listName(path string) string {
	base := filepath.Base(path)
	if name := strings.TrimSuffix(base, filepath.Ext(base)); name != "" {
		return name
	}
	return base
}

// Lookup returns the score of the longest prefix that contains addr and the name of its list; 100 and no name for
// addresses that are on no list, or on an allow list. It does not allocate and may be called at any time.
func (l *Lists) Lookup(addr netip.Addr) (score int, list string, listed bool) {
	t := l.table.Load()
	addr = addr.Unmap()
	if t.allow.Contains(addr) {
		return BestScore, "", false
	}
	v, ok := t.scores.Lookup(addr)
	if !ok {
		return BestScore, "", false
	}
	return int(v.score), l.sources[v.list].name, true
}

// Stats returns the state of each list, in the order of the command line, allow lists last.
func (l *Lists) Stats() []Stats {
	all := make([]Stats, len(l.sources))
	for i, s := range l.sources {
		all[i] = *s.stats.Load()
	}
	return all
}

// Reload reads every file again, changed or not. Of a file that cannot be used the previous content stays in force;
// the error, already logged, names all of these.
func (l *Lists) Reload() error {
	return l.load(func(*source, os.FileInfo) bool { return true })
}

// Watch reads files again as they change, until ctx ends. It watches their directories, because a file that is
// replaced (by rename, or through the symbolic links of a Kubernetes volume) takes a watch of its own away with it.
// Changes not seen from there, as to a bind-mounted file, to the target of a link, or in a directory that was itself
// replaced, are found by polling.
func (l *Lists) Watch(ctx context.Context) error {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		level.Warn(l.logger).Log("msg", "cannot watch lists, polling only", "every", l.poll, "err", err)
		return l.watch(ctx, nil, nil)
	}
	defer w.Close()
	for _, s := range l.sources {
		dir := filepath.Dir(s.Path)
		if slices.Contains(w.WatchList(), dir) {
			continue
		}
		if err := w.Add(dir); err != nil {
			level.Warn(l.logger).Log("msg", "cannot watch directory, polling only", "dir", dir, "every", l.poll, "err", err)
		}
	}
	return l.watch(ctx, w.Events, w.Errors)
}

// watch looks at the files on every event and every poll, but at most once in the time a file has to settle.
func (l *Lists) watch(ctx context.Context, events <-chan fsnotify.Event, errs <-chan error) error {
	poll := time.NewTicker(l.poll)
	defer poll.Stop()
	pause := time.NewTimer(0) // the first look finds changes made since the load at start
	defer pause.Stop()
	pausing, due := true, true
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-events:
			due = true
		case err := <-errs:
			level.Warn(l.logger).Log("msg", "watching lists", "err", err)
			due = true // events may be lost
		case <-poll.C:
			due = true
		case <-pause.C:
			pausing = false
		}
		if due && !pausing {
			due = l.look()
			pause.Reset(l.settle)
			pausing = true
		}
	}
}

// look reads the files that differ from what was last read and no longer change. It reports whether others do.
func (l *Lists) look() (unsettled bool) {
	_ = l.load(func(s *source, fi os.FileInfo) bool { // load logs
		changed, settled := !same(fi, s.tried), same(fi, s.seen)
		s.seen = fi
		unsettled = unsettled || changed && !settled
		return changed && settled
	})
	return unsettled
}

// same reports whether a file seems untouched. The mode counts, for a file that could not be read and now can.
func same(a, b os.FileInfo) bool {
	if a == nil || b == nil {
		return a == b
	}
	return os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime()) && a.Mode() == b.Mode()
}

// load reads the files that are due and puts what they hold in force, all at once. Only then it says so.
func (l *Lists) load(due func(*source, os.FileInfo) bool) error {
	type result struct {
		source *source
		stats  *Stats // if it could be read
		err    error
	}
	var results []result
	func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		swap := false
		for _, s := range l.sources {
			fi, err := os.Stat(s.Path) // before reading, so that a change meanwhile is noticed
			if !due(s, fi) {
				continue
			}
			s.tried = fi
			r := result{source: s, err: err}
			if err == nil {
				r.stats, r.err = l.read(s, fi)
			}
			if r.err != nil {
				l.failed(s, r.err)
			}
			swap = swap || r.err == nil
			results = append(results, r)
		}
		if swap {
			l.table.Store(l.build())
		}
		for _, r := range results {
			if r.err == nil {
				r.source.stats.Store(r.stats)
			}
		}
	}()
	var errs []error
	for _, r := range results {
		if r.err == nil {
			level.Info(l.logger).Log("list", r.source.name, "msg", "list loaded", "file", r.source.Path,
				"entries", r.stats.Entries, "bad", r.stats.BadLines, "took", time.Since(r.stats.Loaded))
		}
		if l.onReload != nil {
			l.onReload(r.source.name, r.err == nil)
		}
		errs = append(errs, r.err)
	}
	return errors.Join(errs...)
}

// read reads the file of s and returns what is to be said of it once it is in force, or leaves s as it is.
func (l *Lists) read(s *source, fi os.FileInfo) (*Stats, error) {
	start := time.Now()
	logger := log.With(l.logger, "list", s.name)
	c, err := s.readList(fi)
	for _, err := range c.errs {
		level.Warn(logger).Log("msg", "bad line", "err", err)
	}
	if more := c.bad - len(c.errs); more > 0 {
		level.Warn(logger).Log("msg", "more bad lines", "file", s.Path, "count", more)
	}
	if err != nil {
		return nil, err
	}
	if c.promised >= 0 && c.promised != c.records {
		level.Warn(logger).Log("msg", "number of records differs from metadata", "file", s.Path, "want", c.promised, "have", c.records)
	}
	if c.private.IsValid() && !l.allows {
		level.Warn(logger).Log("msg", "list has private addresses, exempt yours with -allow", "file", s.Path, "first", c.private)
	}
	s.entries = c.entries
	stats := *s.stats.Load()
	if !stats.Loaded.IsZero() {
		stats.Reloads++
	}
	stats.Entries, stats.BadLines, stats.Loaded, stats.Modified = len(c.entries), c.bad, start, fi.ModTime()
	return &stats, nil
}

// failed counts and logs that s could not be read again. At start the error is the caller's to report.
func (l *Lists) failed(s *source, err error) {
	stats := *s.stats.Load()
	if stats.Loaded.IsZero() {
		return
	}
	stats.Failures++
	s.stats.Store(&stats)
	level.Error(l.logger).Log("msg", "list not reloaded, previous content stays in force", "list", s.name, "loaded", stats.Loaded, "err", err)
}

func (l *Lists) build() *table {
	t := new(table)
	for i, s := range l.sources {
		for _, e := range s.entries {
			if s.allow {
				t.allow.Insert(e.prefix)
				continue
			}
			t.scores.Modify(e.prefix, func(v verdict, ok bool) (verdict, bool) {
				if !ok || e.score < v.score {
					v = verdict{list: int32(i), score: e.score}
				}
				return v, false
			})
		}
	}
	return t
}

// content is what parseList found in a file.
type content struct {
	entries  []entry // sorted, one for each prefix
	bad      int
	errs     []error      // of the first bad lines
	private  netip.Prefix // the first entry touching privateRanges, if any
	records  int          // DROP JSON lines with a prefix
	promised int          // how many there should be; -1 if not said
}

// entry is a prefix, masked and unmapped, and its score.
type entry struct {
	prefix netip.Prefix
	score  uint8
}

// readList reads a file. Its content is never nil, but of use only without an error, except for what it says of bad lines.
func (s *source) readList(fi os.FileInfo) (*content, error) {
	if !fi.Mode().IsRegular() { // opening a pipe could wait for ever
		return new(content), fmt.Errorf("%s: not a regular file", s.Path)
	}
	f, err := os.Open(s.Path)
	if err != nil {
		return new(content), err
	}
	defer f.Close()
	return parseList(f, s.Path, s.Score, s.allow)
}

// parseList reads a list in any of the formats that parseLine knows, even mixed.
func parseList(r io.Reader, file string, score uint8, allow bool) (*content, error) {
	c := &content{promised: -1}
	sc := bufio.NewScanner(r)
	n := 0
	for sc.Scan() {
		n++
		rec, err := parseLine(sc.Text())
		if err == nil && allow && rec.score >= 0 {
			err = errors.New("a score on an allow list")
		}
		switch {
		case err != nil:
			c.bad++
			if len(c.errs) < maxReported {
				c.errs = append(c.errs, fmt.Errorf("%s:%d: %w", file, n, err))
			}
			continue
		case rec.promised >= 0:
			c.promised = max(c.promised, 0) + rec.promised // one such line for each of several files in one
			continue
		case !rec.prefix.IsValid():
			continue
		}
		if rec.json {
			c.records++
		}
		e := entry{rec.prefix, score}
		if rec.score >= 0 {
			e.score = uint8(rec.score)
		}
		c.entries = append(c.entries, e)
		if !c.private.IsValid() && slices.ContainsFunc(privateRanges, e.prefix.Overlaps) {
			c.private = e.prefix
		}
	}
	if err := sc.Err(); err != nil {
		return c, fmt.Errorf("%s:%d: %w", file, n+1, err)
	}
	if lines := c.bad + len(c.entries); c.bad*100 > lines {
		return c, fmt.Errorf("%s: %d of %d lines are bad, the first: %w", file, c.bad, lines, c.errs[0])
	}
	if len(c.entries) == 0 {
		return c, fmt.Errorf("%s: no entries", file)
	}
	slices.SortFunc(c.entries, func(a, b entry) int {
		return cmp.Or(a.prefix.Compare(b.prefix), cmp.Compare(a.score, b.score))
	})
	c.entries = slices.CompactFunc(c.entries, func(a, b entry) bool { return a.prefix == b.prefix })
	return c, nil
}

// record is what a line says.
type record struct {
	prefix   netip.Prefix // invalid if the line names none
	score    int          // -1 if the line names none
	json     bool
	promised int // number of records according to a line of metadata; -1 on other lines
}

// parseLine parses a line of FireHOL's .netset and .ipset files, of Spamhaus DROP, as text or JSON, or of plain
// addresses and prefixes, each with a score behind it or none.
func parseLine(line string) (record, error) {
	rec := record{score: -1, promised: -1}
	line = strings.TrimSpace(strings.TrimPrefix(line, "\ufeff"))
	if strings.HasPrefix(line, "{") {
		return parseDropJSON(line)
	}
	if i := strings.IndexAny(line, "#;"); i >= 0 {
		line = line[:i]
	}
	field, rest := strings.TrimSpace(line), ""
	if field == "" {
		return rec, nil
	}
	if i := strings.IndexAny(field, " \t"); i >= 0 {
		field, rest = field[:i], strings.TrimSpace(field[i:])
	}
	prefix, err := parsePrefix(field)
	if err != nil {
		return rec, err
	}
	if rest != "" {
		score, err := parseScore(rest)
		if err != nil {
			return rec, fmt.Errorf("%.60q after the address: %w", rest, err)
		}
		rec.score = int(score)
	}
	rec.prefix = prefix
	return rec, nil
}

func parseDropJSON(line string) (record, error) {
	rec := record{score: -1, promised: -1}
	var v struct {
		CIDR    string  `json:"cidr"`
		Type    string  `json:"type"`
		Records *uint32 `json:"records"`
	}
	err := json.Unmarshal([]byte(line), &v)
	switch {
	case err != nil:
		return rec, fmt.Errorf("bad JSON: %w", err)
	case v.Type == "metadata":
		if v.Records != nil {
			rec.promised = int(*v.Records)
		}
		return rec, nil
	case v.CIDR == "":
		return rec, errors.New("JSON without cidr")
	}
	rec.json = true
	rec.prefix, err = parsePrefix(v.CIDR)
	return rec, err
}

// parsePrefix parses an address or prefix. Host bits may be set; addresses embedded in IPv6 count as IPv4.
func parsePrefix(s string) (netip.Prefix, error) {
	var p netip.Prefix
	var err error
	if strings.Contains(s, "/") {
		p, err = netip.ParsePrefix(s)
	} else {
		var addr netip.Addr
		addr, err = netip.ParseAddr(s)
		if addr.Zone() != "" {
			return netip.Prefix{}, fmt.Errorf("%.60q has a zone", s)
		}
		p = netip.PrefixFrom(addr, addr.BitLen())
	}
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%.60q is neither an address nor a prefix", s)
	}
	if addr := p.Addr(); addr.Is4In6() {
		if p.Bits() < 96 {
			return netip.Prefix{}, fmt.Errorf("%.60q embeds an IPv4 address but is shorter than /96", s)
		}
		p = netip.PrefixFrom(addr.Unmap(), p.Bits()-96)
	}
	return p.Masked(), nil
}
