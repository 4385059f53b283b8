package lists

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-kit/log"
	"github.com/go-kit/log/level"
	"github.com/spoa-go/spoa/cmd/internal/reputation"
)

// Options says which lists there are, and how they are kept up to date.
type Options struct {
	Logger log.Logger // default: none
	Block  []File
	Allow  []File

	Refresh time.Duration // how often URLs are fetched, unless their makers want it less often; default an hour
	Cache   string        // directory for the last good copy of each URL; empty for none
	Client  *http.Client  // for URLs; its CheckRedirect and Timeout are replaced; default: one that verifies TLS
	Stdin   io.Reader     // of the list named "-"

	settle, pause, timeout time.Duration // for tests; 0 for those of Lists and remote
	most                   int64         // for tests, too
}

// Lists answers what block lists and allow lists say of an address. Their sources
// may change at any time. Lookups never wait for a reload: a new table is built
// aside and takes the place of the old one at once.
type Lists struct {
	options Options
	logger  log.Logger
	remote  remote
	table   atomic.Pointer[table]

	poll     time.Duration              // how often files are looked at without an event
	settle   time.Duration              // how long a changed file must stay as it is before it is read
	onReload func(list string, ok bool) // for tests; nil for none

	opened atomic.Bool // all lists have been in force

	mu      sync.Mutex                // one load at a time; guards named, and the sources' unexported state
	named   []*named                  // in the order of the flags, allow lists last
	sources atomic.Pointer[[]*source] // of all of named, in this order; replaced under mu
}

// named is a flag's list, or the lists of its directory or glob.
type named struct {
	File
	allow   bool
	many    bool
	sources []*source
}

// source is a list and what was last read of it.
type source struct {
	File
	name  string
	shown string // path or URL, without what a URL may have of secrets
	allow bool

	set   atomic.Pointer[set] // in force; replaced under Lists.mu
	stats atomic.Pointer[Stats]

	file   watched // of a list in a file
	read   bool    // a pipe, which can be read only once, has been
	origin origin  // of a list by URL
}

// Stats describes a list for metrics and the status page.
type Stats struct {
	Name     string
	File     string // path, or URL without its user and query
	Allow    bool
	Entries  int       // different prefixes in force
	BadLines int       // left out of them
	Loaded   time.Time // when the content in force was read
	Modified time.Time // when this content was last changed, as its file or server says
	Reloads  uint64    // that succeeded; the load at start is none
	Failures uint64    // reloads after which the previous content stayed in force
	Refused  map[Reason]uint64
	Problem  string   // why the last reload failed; empty after one that succeeded
	Warnings []string // what is to be known of the content in force

	URL     bool
	Checked time.Time // when the server last answered with the list, or that it has not changed
	Status  int       // the last status of HTTP; 0 if there was no answer
	Next    time.Time // when the URL is fetched next
}

// Open loads all lists, or fails naming each one that cannot be used.
func Open(ctx context.Context, o Options) (*Lists, error) {
	l := &Lists{options: o, logger: o.Logger, poll: 10 * time.Second, settle: cmp.Or(o.settle, 100*time.Millisecond)}
	if l.logger == nil {
		l.logger = log.NewNopLogger()
	}
	if l.options.Refresh <= 0 {
		l.options.Refresh = time.Hour
	}
	l.remote = newRemote(l.options)
	for _, f := range o.Block {
		l.named = append(l.named, &named{File: f})
	}
	for _, f := range o.Allow {
		f.Score = BestScore
		l.named = append(l.named, &named{File: f, allow: true})
	}
	l.table.Store(newTable(nil))
	l.remote.cache.sweep()
	l.mu.Lock()
	l.expand(true)
	l.mu.Unlock()
	err := l.loadFiles(ctx, func(*source) bool { return true })
	if err = errors.Join(err, l.eachURL(func(s *source) error { return l.openURL(ctx, s) })); err != nil {
		return nil, err
	}
	l.opened.Store(true)
	return l, nil
}

// expand finds the files of directories and globs. The caller must hold mu.
func (l *Lists) expand(start bool) (changed bool) {
	var all []*source
	for _, n := range l.named {
		paths := []string{n.Path}
		if !n.url() && n.Path != "-" && (n.many || start) {
			paths, n.many = expandPath(n.Path)
		}
		old := n.sources
		n.sources = nil
		for _, path := range paths {
			i := slices.IndexFunc(old, func(s *source) bool { return s.Path == path })
			if i < 0 {
				f := n.File
				f.Path = path
				n.sources = append(n.sources, newSource(f, n.allow))
				changed = true
				continue
			}
			n.sources = append(n.sources, old[i])
		}
		for _, s := range old {
			if !slices.Contains(n.sources, s) {
				changed = true
				level.Warn(l.logger).Log("list", s.name, "msg", "list gone with its file", "file", s.shown)
			}
		}
		if n.many && len(n.sources) == 0 && (start || len(old) > 0) {
			level.Warn(l.logger).Log("msg", "no list there", "path", n.Path)
		}
		all = append(all, n.sources...)
	}
	if len(all) > maxLists {
		level.Error(l.logger).Log("msg", "too many lists, the last are left out", "want", maxLists, "have", len(all))
		all = all[:maxLists]
	}
	l.sources.Store(&all)
	return changed
}

func newSource(f File, allow bool) *source {
	s := &source{File: f, allow: allow, shown: f.Path}
	base := filepath.Base(f.Path)
	switch {
	case f.url():
		s.shown, base = showURL(f.Path)
	case f.Path == "-":
		s.shown, base = "standard input", "stdin"
	}
	if s.name = strings.TrimSuffix(strings.TrimSuffix(base, ".gz"), filepath.Ext(strings.TrimSuffix(base, ".gz"))); s.name == "" {
		s.name = base
	}
	s.name, s.shown = reputation.Printable(s.name), reputation.Printable(s.shown) // both reach terminals and HTTP headers
	s.stats.Store(&Stats{Name: s.name, File: s.shown, Allow: allow, URL: f.url()})
	return s
}

// Lookup returns what all lists together say of addr: between lists the lowest
// score, within one that of the longest prefix, and 100 if it is on an allow list
// or on none. It does not allocate and may be called at any time.
func (l *Lists) Lookup(addr netip.Addr) Verdict { return l.table.Load().lookup(addr) }

// Excludes reports whether an address is surely on no list. Often it is false for
// others that are on none, as for all of IPv6, but it takes less than Lookup. The
// address must not be an IPv4-mapped one.
func (l *Lists) Excludes(addr netip.Addr) bool { return l.table.Load().excludes(addr) }

// Stats returns the state of each list, in the order of the flags, allow lists
// last.
func (l *Lists) Stats() []Stats {
	sources := *l.sources.Load()
	all := make([]Stats, len(sources))
	for i, s := range sources {
		all[i] = *s.stats.Load()
	}
	return all
}

// Empty returns the directories and globs in which there is no list now.
func (l *Lists) Empty() (paths []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, n := range l.named {
		if n.many && len(n.sources) == 0 {
			paths = append(paths, reputation.Printable(n.Path))
		}
	}
	return paths
}

// Reload reads every list again, changed or not; those by URL only if their
// servers have another version, and do not want to be asked later. Of one that cannot be used the previous content
// stays in force; the error, already logged, names all of these.
func (l *Lists) Reload(ctx context.Context) error {
	err := l.loadFiles(ctx, func(*source) bool { return true })
	return errors.Join(err, l.eachURL(func(s *source) error {
		if l.tooSoon(s) {
			return nil
		}
		return l.refresh(ctx, s)
	}))
}

// result is what became of a list that was read.
type result struct {
	source  *source
	content *content
	stats   Stats // if it was read
	before  int   // entries before
	err     error
}

// accept decides whether content may come into force, and lets s have it if so,
// but not the table yet. The caller must hold mu.
func (l *Lists) accept(s *source, c *content, err error, modified time.Time) result {
	r := result{source: s, content: c, err: err, stats: *s.stats.Load()}
	for _, err := range c.errs {
		level.Warn(l.logger).Log("list", s.name, "msg", "bad line", "err", err)
	}
	if more := c.bad - len(c.errs); more > 0 {
		level.Warn(l.logger).Log("list", s.name, "msg", "more bad lines", "file", s.shown, "count", more)
	}
	first := r.stats.Loaded.IsZero()
	if r.err == nil && !first {
		r.err = c.shrunk(s.File, s.shown, r.stats.Entries)
	}
	if r.err != nil {
		l.refused(s, r.err)
		return r
	}
	if !first {
		r.stats.Reloads++
	}
	r.before, r.stats.Entries, r.stats.BadLines, r.stats.Problem = r.stats.Entries, c.set.len(), c.bad, ""
	r.stats.Loaded, r.stats.Modified = time.Now(), modified
	r.stats.Warnings = c.warnings(s, l.hasAllow(), r.before)
	s.set.Store(&c.set)
	return r
}

func (l *Lists) hasAllow() bool { return len(l.options.Allow) > 0 }

// refused counts and logs that s could not be read again. At start the error is
// the caller's to report.
func (l *Lists) refused(s *source, err error) {
	stats := *s.stats.Load()
	counts := make(map[Reason]uint64, len(stats.Refused)+1)
	for reason, n := range stats.Refused {
		counts[reason] = n
	}
	counts[reasonOf(err)]++
	stats.Refused, stats.Problem = counts, err.Error()
	switch {
	case !stats.Loaded.IsZero():
		stats.Failures++
		level.Error(l.logger).Log("msg", "list not reloaded, previous content stays in force", "list", s.name,
			"loaded", stats.Loaded, "reason", reasonOf(err), "err", err)
	case l.opened.Load():
		level.Error(l.logger).Log("msg", "list not loaded", "list", s.name, "reason", reasonOf(err), "err", err)
	}
	s.stats.Store(&stats)
}

// manyEntries is how many make it worth while to return memory at once.
const manyEntries = 1 << 16

// enforce builds the table anew and then says what came into force. The caller
// must hold mu and have no reference to the sets that were before.
func (l *Lists) enforce(results []result) {
	var rulers []ruler
	entries := 0
	for _, s := range *l.sources.Load() {
		if set := s.set.Load(); set != nil {
			rulers = append(rulers, ruler{s.name, s.allow, set})
			entries += set.len()
		}
	}
	if entries >= manyEntries {
		debug.FreeOSMemory() // what was before goes before the new table comes, whose place may be another
	}
	l.table.Store(newTable(rulers))
	for _, r := range results {
		if r.err == nil {
			r.source.stats.Store(&r.stats)
		}
	}
	if entries >= manyEntries {
		debug.FreeOSMemory()
	}
}

// report logs what was read and is in force now. No lock is held.
func (l *Lists) report(results []result) error {
	var errs []error
	for _, r := range results {
		errs = append(errs, r.err)
		if r.err == nil {
			level.Info(l.logger).Log("list", r.source.name, "msg", "list loaded", "file", r.source.shown,
				"entries", r.stats.Entries, "bad", r.stats.BadLines)
			for _, w := range r.stats.Warnings {
				level.Warn(l.logger).Log("list", r.source.name, "msg", w)
			}
		}
		if l.onReload != nil {
			l.onReload(r.source.name, r.err == nil)
		}
	}
	return errors.Join(errs...)
}

// warnings says what is to be known of a list that comes into force.
func (c *content) warnings(s *source, hasAllow bool, before int) (all []string) {
	warn := func(format string, args ...any) {
		w := fmt.Sprintf(format, args...)
		if !strings.HasPrefix(w, s.shown+":") { // as an error that names the line does
			w = s.shown + ": " + w
		}
		all = append(all, w)
	}
	if c.numbers > 0 && c.column.Kind == ColumnUnsaid {
		warn("the numbers behind addresses (%d, the first in line %d) are not used, each address scores %d; to choose, put ,column=KIND "+
			"behind the list's name, or a comment \"# spoa: column=KIND\" before its first entry; KIND is %s", c.numbers, c.number, s.Score, columnKinds)
	}
	if c.numbers == 0 && c.lines > 0 && (c.column.Kind == ColumnScore || c.column.Kind == ColumnBadness) {
		warn("column=%v, but no address has a number behind it; each scores %d", c.column, s.Score)
	}
	switch entries := c.set.len(); {
	case c.lines == 0 && before > 0:
		warn("no entries, a list of nothing; it had %d", before)
	case c.lines == 0:
		warn("no entries, a list of nothing")
	case entries == 0:
		warn("no entries: none of %d reaches %v", c.lines, c.column)
	}
	if c.json.said && c.json.have > c.json.want || c.text.said && c.text.have > c.text.want {
		warn("%d entries, more than the %d that it says", c.json.have+c.text.have, c.json.want+c.text.want)
	}
	if c.cut != nil {
		warn("%v; taken nevertheless, by accept=cut", c.cut)
	}
	if c.hasShrunk(before) {
		warn("%d entries, less than half of %d; taken nevertheless, by accept=shrunk", c.set.len(), before)
	}
	if c.wide != nil {
		warn("%v; taken nevertheless, by accept=wide", c.wide)
	}
	if strings.HasPrefix(s.Path, "http://") {
		warn("fetched without TLS, anybody on the way can change it")
	}
	if c.private.IsValid() && !hasAllow {
		warn("it has private addresses, such as %v; exempt yours with -allow", c.private)
	}
	return all
}
