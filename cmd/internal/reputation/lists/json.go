package lists

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
)

var errNoField = errors.New("JSON without an address: want cidr, ip or ip_address")

// isDocument reports whether a list that begins so is JSON that is not made of an
// object with an address on each line.
func isDocument(head []byte) bool {
	line, _, _ := bytes.Cut(bytes.TrimLeft(head, " \t\r\n"), []byte("\n"))
	line = bytes.TrimSpace(line)
	if len(line) == 0 {
		return false
	}
	switch rest := bytes.TrimLeft(head[bytes.IndexByte(head, line[0])+1:], " \t\r\n"); {
	case line[0] == '[':
		return len(rest) == 0 || bytes.IndexByte([]byte(`{["]`), rest[0]) >= 0
	case line[0] != '{':
		return false
	}
	v, err := decodeObject(line)
	if err != nil {
		return !bytes.HasSuffix(line, []byte("}")) || len(line) == len(head)
	}
	if v["type"] == "metadata" {
		return false
	}
	for key := range v {
		if addressFields[fieldName(key)] {
			return false
		}
	}
	for _, value := range v {
		switch value.(type) {
		case []any, map[string]any:
			return true
		}
	}
	return false
}

func decodeObject(line []byte) (v map[string]any, err error) {
	d := json.NewDecoder(bytes.NewReader(line))
	d.UseNumber()
	if err = d.Decode(&v); err == nil {
		if _, more := d.Token(); more != io.EOF {
			err = errors.New("something behind the object")
		}
	}
	if err != nil {
		return nil, fmt.Errorf("bad JSON: %w", err)
	}
	return v, nil
}

// object takes an object of JSON that should have an address.
func (p *parser) object(v map[string]any) {
	if v["type"] == "metadata" { // of Spamhaus
		if n, ok := v["records"].(json.Number); ok {
			if n, err := strconv.ParseUint(n.String(), 10, 32); err == nil {
				p.json.say(n)
			}
		}
		p.comments++
		return
	}
	if _, ok := v["sblid"]; ok {
		p.spamhaus = true
	}
	p.json.have++
	rec, err := p.objectRecord(v)
	if err == nil && rec.prefix.IsValid() {
		err = p.take(rec)
	}
	if err != nil {
		p.badLine(err)
	}
}

func (p *parser) objectRecord(v map[string]any) (rec record, err error) {
	if t, ok := v["ioc_type"].(string); ok && !isIP(t) {
		return rec, nil
	}
	address, note := "", ""
	for key, value := range v {
		s, ok := value.(string)
		switch name := fieldName(key); {
		case !ok || s == "":
		case addressFields[name] && address != "":
			return rec, errors.New("JSON with two addresses in an object: want one")
		case addressFields[name]:
			address = s
		case noteFields[name] && (note == "" || key < note):
			note = key
		}
	}
	if address == "" {
		return rec, errNoField
	}
	if rec, err = parseEntry([]byte(address)); err != nil {
		return rec, err
	}
	if s, ok := v[note].(string); ok {
		rec.note = []byte(s)
	}
	number, found := v[p.Field]
	if p.Field != "" && found {
		rec.number = []byte(fmt.Sprint(number))
	}
	return rec, p.needsField(found)
}

// document reads JSON whose records may be anywhere, and as long as it likes:
// objects with an address, or strings in arrays.
func (p *parser) document() error {
	p.blank = false
	lines := &lineCounter{r: p.in}
	d := documentReader{p, json.NewDecoder(lines), lines}
	d.UseNumber()
	err := error(nil)
	for err == nil {
		var token json.Token
		if token, err = d.Token(); err == nil {
			err = unexpected(d.container(token, 0))
		}
		d.at()
	}
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF):
		return refuse(Cut, fmt.Errorf("%s:%d: the end of the JSON is missing", p.name, p.line))
	case err != io.EOF:
		return refuse(Malformed, fmt.Errorf("%s:%d: bad JSON: %w", p.name, p.line, err))
	case !p.begun && p.comments == 0:
		return refuse(Malformed, fmt.Errorf("%s: %w", p.name, errNoField))
	}
	return nil
}

// documentReader reads JSON as a stream down to the elements of arrays.
type documentReader struct {
	*parser
	*json.Decoder
	lines *lineCounter
}

// at takes the line up to which the document has been read for that of errors.
func (d *documentReader) at() { d.line = d.lines.at(d.InputOffset()) }

// container reads what begins with token.
func (d *documentReader) container(token json.Token, depth int) error {
	switch {
	case depth > 100:
		return errors.New("nested too deep")
	case token == json.Delim('['):
		d.comments++ // an empty one is a list of nothing
		for d.More() {
			var v any
			if err := d.Decode(&v); err != nil {
				return unexpected(err)
			}
			d.at()
			d.element(v)
		}
	case token == json.Delim('{'):
		if err := d.members(depth); err != nil {
			return err
		}
	default:
		return fmt.Errorf("%.60q: want objects or arrays", fmt.Sprint(token))
	}
	_, err := d.Token()
	return unexpected(err)
}

// members reads the members of an object, which may be a record itself.
func (d *documentReader) members(depth int) error {
	scalars := make(map[string]any)
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return unexpected(err)
		}
		value, err := d.Token()
		if err != nil {
			return unexpected(err)
		}
		if _, ok := value.(json.Delim); !ok {
			scalars[key.(string)] = value
		} else if err := d.container(value, depth+1); err != nil {
			return err
		}
	}
	d.at()
	if hasAddress(scalars) || scalars["type"] == "metadata" {
		d.object(scalars)
	}
	return nil
}

// element takes an element of an array: an address, or an object that has one or
// holds others that do.
func (p *parser) element(v any) {
	switch v := v.(type) {
	case string:
		p.json.have++
		rec, err := parseEntry([]byte(v))
		if err == nil {
			err = p.take(rec)
		}
		if err != nil {
			p.badLine(err)
		}
	case []any:
		for _, e := range v {
			p.element(e)
		}
	case map[string]any:
		if !hasAddress(v) && p.nested(v) {
			return
		}
		p.object(v)
	default:
		p.badLine(fmt.Errorf("%.60q: want an address, or an object with one", fmt.Sprint(v)))
	}
}

// nested takes what an object without an address holds, and reports whether that
// was anything.
func (p *parser) nested(v map[string]any) (found bool) {
	for _, key := range slices.Sorted(maps.Keys(v)) {
		switch value := v[key].(type) {
		case []any, map[string]any:
			found = true
			p.element(value)
		}
	}
	return found
}

func hasAddress(v map[string]any) bool {
	for key, value := range v {
		if s, ok := value.(string); ok && s != "" && addressFields[fieldName(key)] {
			return true
		}
	}
	return false
}

func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// lineCounter knows on which line of what is read through it an offset lies.
type lineCounter struct {
	r     io.Reader
	read  int64
	ends  []int64 // offsets of the ends of lines that are still ahead
	lines int     // that ended before
}

func (c *lineCounter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	for i, b := range p[:n] {
		if b == '\n' {
			c.ends = append(c.ends, c.read+int64(i))
		}
	}
	c.read += int64(n)
	return n, err
}

// at returns the line of an offset, which must not be less than the one before.
func (c *lineCounter) at(offset int64) int {
	n := 0
	for n < len(c.ends) && c.ends[n] < offset {
		n++
	}
	c.lines += n
	c.ends = c.ends[n:]
	return c.lines + 1
}
