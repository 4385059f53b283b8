package lists

import (
	"bufio"
	"bytes"
	"encoding/csv"
	"errors"
	"fmt"
	"strings"
)

// addressFields are the names that makers of lists give to the field with the
// address, and noteFields those with a word on it, without case, _, - and spaces.
var (
	addressFields = map[string]bool{
		"ip": true, "ipaddress": true, "ipaddr": true, "address": true, "addr": true, "dstip": true, "srcip": true,
		"cidr": true, "network": true, "subnet": true, "prefix": true, "range": true, "iprange": true, "ipprefix": true,
		"ipv4": true, "ipv6": true, "ipv4prefix": true, "ipv6prefix": true, "ipport": true, "ioc": true, "iocvalue": true,
	}
	noteFields = map[string]bool{
		"sblid": true, "malware": true, "malwareprintable": true, "listingreason": true, "reason": true, "comment": true,
		"description": true, "threat": true, "name": true,
	}
	squeeze = strings.NewReplacer("_", "", "-", "", " ", "", ".", "")
)

func fieldName(s string) string { return squeeze.Replace(strings.ToLower(strings.TrimSpace(s))) }

// titles says in which column of CSV what is.
type titles struct{ address, note, number, iocType int }

// findTitles reports whether line has the titles of CSV, and takes them. They may
// as well have been in the comment before it. It fails if they do not say which
// field has the address, or the number.
func (p *parser) findTitles(line []byte) (isTitle bool, err error) {
	if bytes.IndexByte(line, ',') < 0 {
		return false, nil
	}
	first, _ := cutField(line)
	if _, err := parsePrefix(first); err != nil {
		for i, s := range [][]byte{line, p.noted} {
			t, err := p.parseTitles(s)
			if err != nil {
				return false, refuse(Malformed, fmt.Errorf("%s:%d: %w", p.name, p.line, err))
			}
			if t != nil {
				p.titles = t
				return i == 0, nil
			}
		}
	}
	return false, nil
}

// parseTitles returns nil if no field has the name of one with addresses.
func (p *parser) parseTitles(line []byte) (*titles, error) {
	fields, err := p.fields.split(line)
	if err != nil || len(fields) < 2 {
		return nil, nil
	}
	t := &titles{-1, -1, -1, -1}
	for i, title := range fields {
		switch name := fieldName(title); {
		case title == p.Field:
			t.number = i
		case name == "ioctype":
			t.iocType = i
		case addressFields[name] && t.address >= 0:
			return nil, fmt.Errorf("both %q and %q name addresses: want CSV with one such column", fields[t.address], title)
		case addressFields[name]:
			t.address = i
		case noteFields[name] && t.note < 0:
			t.note = i
		}
	}
	if t.address < 0 {
		return nil, nil
	}
	return t, p.needsField(t.number >= 0)
}

// needsField fails if there is a column to be read and its name is not known.
func (p *parser) needsField(found bool) error {
	switch {
	case p.Field == "" && p.Column.Kind > ColumnIgnore:
		return fmt.Errorf("column=%v: want field=NAME too, the field that holds the number", p.Column)
	case p.Field != "" && !found:
		return fmt.Errorf("field=%s: no such field", p.Field)
	}
	return nil
}

// csvFields splits lines of CSV, each alone, so that a quote out of place spoils
// no more than its line.
type csvFields struct {
	line bytes.Reader
	in   *bufio.Reader
}

func (c *csvFields) split(line []byte) ([]string, error) {
	c.line.Reset(line)
	if c.in == nil {
		c.in = bufio.NewReader(nil)
	}
	c.in.Reset(&c.line)
	r := csv.NewReader(c.in)
	r.TrimLeadingSpace = true
	return r.Read()
}

func (p *parser) csvRecord(line []byte) (record, error) {
	fields, err := p.fields.split(line)
	if err != nil {
		var parse *csv.ParseError
		if errors.As(err, &parse) {
			err = parse.Err
		}
		return record{}, fmt.Errorf("bad CSV: %w", err)
	}
	field := func(i int) string {
		if i < 0 || i >= len(fields) {
			return ""
		}
		return strings.TrimSpace(fields[i])
	}
	if t := field(p.titles.iocType); t != "" && !isIP(t) {
		return record{}, nil
	}
	rec, err := parseEntry([]byte(field(p.titles.address)))
	rec.note, rec.number = []byte(field(p.titles.note)), []byte(field(p.titles.number))
	return rec, err
}

// isIP reports whether abuse.ch's ioc_type is one of addresses, and not of
// domains, URLs or hashes.
func isIP(iocType string) bool { return strings.HasPrefix(iocType, "ip") }
