// Package mmdb looks addresses up in MaxMind DB files: which country they are
// in, and which autonomous system (network). It scores subjects by these.
package mmdb

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-kit/log"
	"github.com/go-kit/log/level"
	"github.com/oschwald/maxminddb-golang/v2"
	"github.com/spoa-go/spoa/cmd/internal/reputation"
)

// A Database is a reputation.Locator of one file, which may change at any time.
// A file that is not whole does not come into force.
//
// What a file says is kept in another form, which is quicker to search; so a file
// may also be written over in place.
type Database struct {
	path     string
	logger   log.Logger
	data     atomic.Pointer[data]
	networks atomic.Bool // it has, or had, numbers of autonomous systems

	mu      sync.Mutex  // one reload at a time; guards what follows
	read    os.FileInfo // as it was when last read, successfully or not
	problem string      // of the last reload; empty if it succeeded
}

// data is what is used of a file.
type data struct {
	kind     string // of the database
	built    time.Time
	networks int     // with a record
	places   []place // by number; that of number 0 is unknown
	runs     *runs
}

type place struct {
	country string
	asn     uint32
	org     string
}

// Open reads a file.
func Open(path string, logger log.Logger) (*Database, error) {
	d := &Database{path: path, logger: logger}
	if err := d.load(); err != nil {
		return nil, err
	}
	return d, nil
}

// Locate implements reputation.Locator.
func (d *Database) Locate(s reputation.Subject) reputation.Subject {
	p := d.data.Load().lookup(s.Addr)
	if s.Country == "" {
		s.Country = p.country
	}
	if s.ASN == 0 {
		s.ASN, s.Org = p.asn, p.org
	}
	return s
}

// HasNetworks reports whether the file has, or has had before a reload, numbers of
// autonomous systems.
func (d *Database) HasNetworks() bool { return d.networks.Load() }

func (d *data) lookup(addr netip.Addr) *place { return &d.places[d.runs.lookup(addr)] }

// Status implements reputation.Reporter. Updated is when the database was built.
func (d *Database) Status() reputation.Status {
	d.mu.Lock()
	defer d.mu.Unlock()
	data := d.data.Load()
	return reputation.Status{
		Name: filepath.Base(d.path), Kind: "mmdb", Entries: data.networks,
		Updated: data.built, Problem: d.problem,
	}
}

// Reload reads the file again. If it cannot be used, the previous content stays
// in force, and the error is logged.
func (d *Database) Reload() error {
	err := d.load()
	if err != nil {
		level.Error(d.logger).Log("msg", "database not reloaded, previous content stays in force", "err", err)
	}
	return err
}

// Watch reads the file again as it changes, until ctx ends.
func (d *Database) Watch(ctx context.Context, interval time.Duration) error {
	d.mu.Lock()
	read := d.read
	d.mu.Unlock()
	reputation.WatchFile(ctx, d.path, interval, read, func(os.FileInfo) { _ = d.Reload() }) // logs
	return ctx.Err()
}

func (d *Database) load() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	start := time.Now()
	fi, data, err := read(d.path)
	d.read, d.problem = fi, ""
	if err != nil {
		err = fmt.Errorf("%s: %w", d.path, err)
		d.problem = err.Error()
		return err
	}
	if slices.ContainsFunc(data.places, func(p place) bool { return p.asn != 0 }) {
		d.networks.Store(true) // first: they are only set from now on
	}
	d.data.Store(data)
	level.Info(d.logger).Log("msg", "database loaded", "file", d.path, "type", data.kind, "built", data.built.UTC().Format(time.DateOnly),
		"networks", data.networks, "places", len(data.places), "took", time.Since(start))
	return nil
}

// read reads a file and all of its records.
func read(path string) (os.FileInfo, *data, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, nil, cause(err)
	}
	if !fi.Mode().IsRegular() { // opening a pipe could wait for ever
		return fi, nil, errors.New("not a regular file")
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return fi, nil, cause(err)
	}
	d, err := parse(b)
	return fi, d, err
}

// cause returns what went wrong without the path, which the caller names.
func cause(err error) error {
	if pe, ok := errors.AsType[*os.PathError](err); ok {
		return pe.Err
	}
	return err
}

// parse reads all records of a database. It keeps nothing of b.
func parse(b []byte) (*data, error) {
	r, err := maxminddb.OpenBytes(b)
	if err != nil {
		return nil, err
	}
	d := &data{kind: r.Metadata.DatabaseType, built: r.Metadata.BuildTime(), places: make([]place, 1)}
	numbers := map[place]uint32{{}: 0}
	known := make(map[uintptr]uint32) // places by offset of their record
	var networks []network
	for res := range r.Networks() {
		if err := res.Err(); err != nil {
			return nil, err
		}
		d.networks++
		number, ok := known[res.Offset()]
		if !ok {
			var v any
			if err := res.Decode(&v); err != nil {
				return nil, fmt.Errorf("%v: %w", res.Prefix(), err)
			}
			p := placeOf(v)
			if number, ok = numbers[p]; !ok {
				number = uint32(len(d.places))
				numbers[p] = number
				d.places = append(d.places, p)
			}
			known[res.Offset()] = number
		}
		networks = append(networks, network{res.Prefix(), number})
	}
	if len(d.places) == 1 {
		return nil, fmt.Errorf("no countries and no networks in this database of type %q", d.kind)
	}
	d.runs = newRuns(networks)
	return d, nil
}

// placeOf knows the records of MaxMind, DB-IP, IPinfo and ip-location-db.
func placeOf(v any) place {
	m, _ := v.(map[string]any)
	p := place{
		country: first(field(m, "country", "iso_code"), field(m, "country_code"), field(m, "country"), field(m, "registered_country", "iso_code")),
		org:     first(field(m, "autonomous_system_organization"), field(m, "as_name"), field(m, "name")),
	}
	p.org = reputation.Text(p.org)
	if p.country = strings.ToUpper(p.country); !isCountry(p.country) { // such as a name
		p.country = ""
	}
	switch n := m["autonomous_system_number"].(type) {
	case uint64:
		p.asn = uint32(n)
	case uint32:
		p.asn = n
	default:
		p.asn = number(first(field(m, "autonomous_system_number"), field(m, "asn")))
	}
	if p.asn == 0 {
		p.org = "" // of whatever it is
	}
	return p
}

// field returns the string at that path, or none.
func field(m map[string]any, path ...string) string {
	for _, key := range path[:len(path)-1] {
		m, _ = m[key].(map[string]any)
	}
	s, _ := m[path[len(path)-1]].(string)
	return s
}

// first returns the first string that is not empty.
func first(all ...string) string {
	for _, s := range all {
		if s != "" {
			return s
		}
	}
	return ""
}

// number parses a number of an autonomous system, with or without AS in front.
// It returns 0 for what is none.
func number(s string) uint32 {
	if len(s) > 2 && strings.EqualFold(s[:2], "AS") {
		s = s[2:]
	}
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil {
		return 0
	}
	return uint32(n)
}
