package lists

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	maxReported = 5        // bad lines of a list that are told one by one
	maxLine     = 16 << 20 // bytes
	maxSize     = 1 << 30  // bytes of a list, unpacked
	sniffed     = 64 << 10 // bytes looked at before the first line is read
)

// content is what a parser found in a list.
type content struct {
	set      set
	lines    int     // with an address
	bad      int     // lines that could not be read
	errs     []error // of the first of these
	below    int     // lines whose count was too low
	numbers  int     // lines with a number behind the address
	number   int     // the first of these
	column   Column  // what this number is
	comments int
	blank    bool // it has not even a comment

	text, json declared
	every      time.Duration // how often its maker changes it; 0 if not said

	spamhaus bool         // it is JSON of Spamhaus, which ends with metadata
	private  netip.Prefix // the first entry that touches privateRanges
	wide     error        // what the first entry is that is too wide
	cut      error        // why the end seems to be missing
}

// declared compares the number of entries that a list says it has with those read.
type declared struct {
	said       bool
	want, have int
}

func (d *declared) say(n uint64) {
	d.said = true // several lists in one file say it several times
	d.want += int(min(n, 1<<40))
}

// parser reads one list.
type parser struct {
	File
	allow bool
	name  string // for errors
	size  int64  // bytes of the list as it is stored, 0 if unknown

	raw    counter
	in     *bufio.Reader
	long   []byte // a line longer than the buffer
	line   int
	begun  bool // an entry has been read
	noted  []byte
	titles *titles // of CSV
	fields csvFields
	ends   bool // the last line had its newline
	tail   tail
	*content
}

// tail is what is to be known of the last entry to see whether it was cut.
type tail struct {
	bad     bool
	bits    int
	is4     bool
	wide    bool
	least4  int // length of the shortest prefix before it
	least6  int
	entries int // on the last line
}

// counter counts the bytes that are read.
type counter struct {
	r io.Reader
	n int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// limited fails where a list is too big.
type limited struct {
	r    io.Reader
	left int64
}

func (l *limited) Read(p []byte) (int, error) {
	if l.left <= 0 {
		return 0, fmt.Errorf("more than %d MiB", maxSize>>20)
	}
	n, err := l.r.Read(p[:min(int64(len(p)), l.left)])
	l.left -= int64(n)
	return n, err
}

// parse reads a list in any of the formats of the package's documentation. The
// name is for errors; size is the number of bytes in r, or 0 if unknown. The
// content is never nil, but of use only without an error, except for what it says
// of bad lines.
func parse(r io.Reader, f File, allow bool, name string, size int64) (*content, error) {
	p := &parser{File: f, allow: allow, name: name, size: size, raw: counter{r: r}, ends: true,
		tail: tail{bits: -1, least4: 33, least6: 129}, content: &content{blank: true}}
	err := p.open()
	if err == nil {
		err = p.read()
	}
	if err == nil {
		err = p.judge()
	}
	p.set.notes.done()
	p.column = p.Column
	if err != nil {
		return p.content, err
	}
	p.set.sort()
	return p.content, nil
}

// open unpacks the list and refuses what is surely none.
func (p *parser) open() error {
	p.in = bufio.NewReaderSize(&limited{&p.raw, maxSize}, sniffed)
	if magic, _ := p.in.Peek(2); string(magic) == "\x1f\x8b" {
		z, err := gzip.NewReader(p.in)
		if err != nil {
			return p.unreadable(err)
		}
		p.in = bufio.NewReaderSize(&limited{z, maxSize}, sniffed)
	}
	head, err := p.in.Peek(sniffed)
	if err != nil && err != io.EOF {
		return p.unreadable(err)
	}
	if bom := []byte("\ufeff"); bytes.HasPrefix(head, bom) {
		p.in.Discard(len(bom))
		head = head[len(bom):]
	}
	text := bytes.TrimSpace(head)
	switch {
	case bytes.HasPrefix(head, []byte("\xff\xfe")), bytes.HasPrefix(head, []byte("\xfe\xff")):
		return refuse(Malformed, fmt.Errorf("%s: text in UTF-16, want UTF-8", p.name))
	case bytes.HasPrefix(text, []byte("<")):
		return refuse(Malformed, fmt.Errorf("%s:1: a web page or XML, no list", p.name))
	}
	return nil
}

func (p *parser) unreadable(err error) error {
	reason := Unreadable
	if errors.Is(err, io.ErrUnexpectedEOF) {
		reason = Cut // of a compressed file or of an answer
	}
	return refuse(reason, fmt.Errorf("%s:%d: %w", p.name, p.line+1, err))
}

func (p *parser) read() error {
	if head, _ := p.in.Peek(sniffed); isDocument(head) {
		return p.document()
	}
	for {
		line, err := p.readLine()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return p.unreadable(err)
		}
		p.line++
		if line = bytes.TrimSpace(bytes.TrimPrefix(line, []byte("\ufeff"))); len(line) == 0 {
			continue
		}
		p.blank = false
		p.tail.entries, p.tail.bad = 0, false
		if isComment(line) {
			err = p.comment(line)
		} else {
			err = p.dataLine(line)
		}
		if err != nil {
			return err
		}
	}
}

// readLine returns the next line, good until the next call, without its end.
func (p *parser) readLine() ([]byte, error) {
	line, err := p.in.ReadSlice('\n')
	if err == bufio.ErrBufferFull {
		p.long = p.long[:0]
		for err == bufio.ErrBufferFull && len(p.long) < maxLine {
			p.long = append(p.long, line...)
			line, err = p.in.ReadSlice('\n')
		}
		p.long = append(p.long, line...)
		line = p.long
		if err == bufio.ErrBufferFull {
			return nil, fmt.Errorf("a line of more than %d MiB", maxLine>>20)
		}
	}
	if err == io.EOF && len(line) > 0 {
		p.ends = false
		return line, nil
	}
	return line, err
}

// comment takes from a comment what it says of the list.
func (p *parser) comment(line []byte) error {
	p.comments++
	text := bytes.Trim(line, "#;!/ \t")
	p.noted = append(p.noted[:0], text...) // it may be the titles of CSV
	if end, ok := bytes.CutPrefix(text, []byte("END ")); ok {
		if n, ok := bytes.CutSuffix(end, []byte(" entries")); ok {
			p.declare(n)
		}
		return nil
	}
	key, value, _ := bytes.Cut(text, []byte(":"))
	value = bytes.TrimSpace(value)
	switch strings.ToLower(string(bytes.TrimSpace(key[:min(len(key), 40)]))) {
	case "entries", "number of entries":
		p.declare(value)
	case "update frequency":
		p.every = max(p.every, parseFrequency(string(value)))
	case "spoa":
		return p.directive(string(value))
	}
	return nil
}

func (p *parser) declare(value []byte) {
	n, _ := cutField(value)
	if n, err := strconv.ParseUint(string(n), 10, 63); err == nil {
		p.text.say(n)
	}
}

// directive obeys a comment "spoa: column=score". The flag wins over it.
func (p *parser) directive(s string) error {
	if p.begun {
		return refuse(Malformed, fmt.Errorf("%s:%d: \"spoa:\" behind the first entry", p.name, p.line))
	}
	said := p.File
	for option := range strings.SplitSeq(s, ",") {
		option = strings.TrimSpace(option)
		err := said.option(option)
		switch {
		case err == nil && strings.HasPrefix(option, "accept"):
			err = errors.New("a list cannot accept its own faults: want accept= behind its name in the flag")
		case err == nil && p.allow && (said.Column.Kind == ColumnScore || said.Column.Kind == ColumnBadness):
			err = errScoreAllowed
		}
		if err != nil {
			return refuse(Malformed, fmt.Errorf("%s:%d: spoa: %w", p.name, p.line, err))
		}
	}
	if p.Column.Kind == ColumnUnsaid {
		p.Column = said.Column
	}
	if p.Field == "" {
		p.Field = said.Field
	}
	return nil
}

// parseFrequency parses what FireHOL says, such as "1 min" or "12 hours".
func parseFrequency(s string) time.Duration {
	number, unit, _ := strings.Cut(s, " ")
	n, err := strconv.ParseUint(number, 10, 16)
	if err != nil {
		return 0
	}
	for prefix, d := range map[string]time.Duration{"min": time.Minute, "hour": time.Hour, "day": 24 * time.Hour, "week": 7 * 24 * time.Hour} {
		if strings.HasPrefix(unit, prefix) {
			return time.Duration(n) * d
		}
	}
	return 0
}

// dataLine reads a line that is no comment. It fails only where the whole list is
// to be refused.
func (p *parser) dataLine(line []byte) error {
	if line[0] == '{' {
		if v, err := decodeObject(line); err != nil {
			p.badLine(err)
		} else {
			p.object(v)
		}
		return nil
	}
	if p.titles == nil && !p.begun {
		isTitle, err := p.findTitles(line)
		if err != nil || isTitle {
			return err
		}
	}
	var rec record
	var err error
	if p.titles != nil {
		rec, err = p.csvRecord(line)
	} else {
		rec, err = parseLine(line, p.allow, p.Column.Kind == ColumnIgnore)
	}
	named := rec.prefix.IsValid() || rec.all
	if err != nil || named || p.titles != nil {
		p.text.have++
	}
	if err == nil && named {
		err = p.take(rec)
	}
	if err != nil {
		p.badLine(err)
	}
	return nil
}

func (p *parser) badLine(err error) {
	p.bad++
	p.begun, p.tail.bad = true, true
	if len(p.errs) < maxReported {
		p.errs = append(p.errs, fmt.Errorf("%s:%d: %w", p.name, p.line, err))
	}
}

// take adds the entries of a record.
func (p *parser) take(rec record) error {
	score, listed, err := p.Column.judge(p.Score, rec.number)
	if err != nil {
		return err
	}
	p.begun = true
	p.lines++
	if len(rec.number) > 0 && !rec.aside {
		if p.numbers++; p.numbers == 1 {
			p.number = p.line
		}
	}
	if !listed {
		p.below++
		return nil
	}
	e := entry{score: score, note: p.set.notes.add(rec.note)}
	add := func(prefix netip.Prefix) {
		e.prefix = prefix
		p.add(e)
	}
	switch {
	case rec.all:
		add(netip.PrefixFrom(netip.IPv4Unspecified(), 0))
		add(netip.PrefixFrom(netip.IPv6Unspecified(), 0))
	case rec.last.IsValid():
		rangePrefixes(rec.prefix.Addr(), rec.last, add)
	default:
		add(rec.prefix)
	}
	return nil
}

func (p *parser) add(e entry) {
	p.set.add(e, p.grow)
	if !p.private.IsValid() && slices.ContainsFunc(privateRanges, e.prefix.Overlaps) {
		p.private = e.prefix
	}
	if p.wide == nil && isWide(e.prefix) {
		p.wide = fmt.Errorf("%s:%d: %v is wider than any feed has by intention", p.name, p.line, e.prefix)
	}
	p.tail.note(e.prefix)
}

// note remembers the last prefix of the list, and the shortest before its line.
func (t *tail) note(prefix netip.Prefix) {
	if t.entries == 0 && t.bits >= 0 {
		if t.is4 {
			t.least4 = min(t.least4, t.bits)
		} else {
			t.least6 = min(t.least6, t.bits)
		}
	}
	t.entries++
	t.bits, t.is4, t.wide = prefix.Bits(), prefix.Addr().Is4(), isWide(prefix)
}

// grow returns the capacity that will do for the whole list, judged by what has
// been read of it, so that little is allocated only to be copied. The fewer the
// entries, the less they say of the whole, and the more room is left.
func (p *parser) grow(length int) int {
	least := max(64, length+length/4)
	read := p.raw.n - int64(p.in.Buffered()) // or a little more of a compressed list
	if p.size == 0 || read < 4*sniffed {
		return 2 * least
	}
	n := float64(length)
	return max(least, int(1.01*(n+3*math.Sqrt(n))*float64(p.size)/float64(read)))
}
