package mmdb

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-kit/log"
	"github.com/go-kit/log/level"
	"github.com/spoa-go/spoa/cmd/internal/reputation"
)

// NetworkFlags is a flag.Value of N=SCORE, the score of an autonomous system,
// and of FILE or FILE=SCORE, a list of them.
type NetworkFlags struct {
	Numbers map[uint32]uint8
	Files   []NetworkFile
}

// A NetworkFile is a list of autonomous systems that have one score.
type NetworkFile struct {
	Path  string
	Score uint8
}

// String returns what was set, but for the scores.
func (n *NetworkFlags) String() string {
	var all []string
	for number := range n.Numbers {
		all = append(all, fmt.Sprint(number))
	}
	for _, f := range n.Files {
		all = append(all, f.Path)
	}
	return strings.Join(all, ",")
}

// Set adds a number or a file.
func (n *NetworkFlags) Set(text string) error {
	what, worth, scored := strings.Cut(text, "=")
	var score uint8
	if scored {
		var err error
		if score, err = parseScore(worth); err != nil {
			return err
		}
	}
	if what == "" {
		return errors.New("want N=SCORE, FILE or FILE=SCORE")
	}
	if asn := number(what); asn != 0 {
		if !scored {
			return fmt.Errorf("%s: want a score: %s=SCORE", what, what)
		}
		if n.Numbers == nil {
			n.Numbers = make(map[uint32]uint8)
		}
		n.Numbers[asn] = score
		return nil
	}
	n.Files = append(n.Files, NetworkFile{what, score})
	return nil
}

// Networks is a reputation.Source of scores by autonomous system.
type Networks struct {
	NetworkFile
	name   string
	logger log.Logger
	table  atomic.Pointer[map[uint32]reputation.Finding]

	mu      sync.Mutex // one reload at a time; guards what follows
	read    os.FileInfo
	loaded  time.Time // when the content in force was read
	problem string    // of the last reload; empty if it succeeded
}

// NewNetworks returns a Source of these scores.
func NewNetworks(scores map[uint32]uint8) *Networks {
	n := &Networks{name: "asn", loaded: time.Now()}
	table := make(map[uint32]reputation.Finding, len(scores))
	for asn, score := range scores {
		table[asn] = reputation.Finding{Source: n.name, State: reputation.Listed, Score: score, Reason: fmt.Sprintf("network AS%d", asn)}
	}
	n.table.Store(&table)
	return n
}

// OpenNetworks reads a list: the JSON lines of Spamhaus ASN-DROP, or lines that
// begin with a number of an autonomous system, with or without AS in front of it.
func OpenNetworks(f NetworkFile, logger log.Logger) (*Networks, error) {
	base := filepath.Base(f.Path)
	n := &Networks{NetworkFile: f, name: strings.TrimSuffix(base, filepath.Ext(base)), logger: logger}
	if err := n.load(); err != nil {
		return nil, err
	}
	return n, nil
}

// Judge implements reputation.Source. It never waits.
func (n *Networks) Judge(_ context.Context, s reputation.Subject) reputation.Finding {
	if f, ok := (*n.table.Load())[s.ASN]; ok {
		return f
	}
	return reputation.Finding{Source: n.name}
}

// Status implements reputation.Reporter.
func (n *Networks) Status() reputation.Status {
	n.mu.Lock()
	defer n.mu.Unlock()
	return reputation.Status{Name: n.name, Kind: "asn", Entries: len(*n.table.Load()), Updated: n.loaded, Problem: n.problem}
}

// Reload reads the file again, if there is one. If it cannot be used, the
// previous content stays in force, and the error is logged.
func (n *Networks) Reload() error {
	if n.Path == "" {
		return nil
	}
	err := n.load()
	if err != nil {
		level.Error(n.logger).Log("msg", "list of networks not reloaded, previous content stays in force", "err", err)
	}
	return err
}

// Watch reads the file again as it changes, until ctx ends.
func (n *Networks) Watch(ctx context.Context, interval time.Duration) error {
	if n.Path == "" {
		<-ctx.Done()
		return ctx.Err()
	}
	n.mu.Lock()
	read := n.read
	n.mu.Unlock()
	reputation.WatchFile(ctx, n.Path, interval, read, func(os.FileInfo) { _ = n.Reload() }) // logs
	return ctx.Err()
}

func (n *Networks) load() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	table, err := n.readFile()
	if err != nil {
		err = fmt.Errorf("%s: %w", n.Path, err)
		n.problem = err.Error()
		return err
	}
	n.table.Store(&table)
	n.problem, n.loaded = "", time.Now()
	level.Info(n.logger).Log("msg", "list of networks loaded", "file", n.Path, "networks", len(table))
	return nil
}

func (n *Networks) readFile() (map[uint32]reputation.Finding, error) {
	fi, err := os.Stat(n.Path)
	n.read = fi
	if err != nil {
		return nil, cause(err)
	}
	if !fi.Mode().IsRegular() { // opening a pipe could wait for ever
		return nil, errors.New("not a regular file")
	}
	f, err := os.Open(n.Path)
	if err != nil {
		return nil, cause(err)
	}
	defer f.Close()
	networks, err := parseNetworks(f)
	if err != nil {
		return nil, err
	}
	table := make(map[uint32]reputation.Finding, len(networks))
	for asn, name := range networks {
		reason := fmt.Sprintf("network %s: AS%d %s", n.name, asn, name)
		table[asn] = reputation.Finding{Source: n.name, State: reputation.Listed, Score: n.Score, Reason: reputation.Text(strings.TrimSpace(reason))}
	}
	return table, nil
}

// parseNetworks returns the names of the autonomous systems of a list, empty
// for those without one. A list that is not whole is an error.
func parseNetworks(r io.Reader) (map[uint32]string, error) {
	networks := make(map[uint32]string)
	records, promised := 0, -1
	sc := bufio.NewScanner(r)
	for line := 1; sc.Scan(); line++ {
		text := bytes.TrimSpace(sc.Bytes())
		if line == 1 {
			text = bytes.TrimPrefix(text, []byte("\ufeff"))
		}
		if len(text) == 0 || text[0] == '#' || text[0] == ';' {
			continue
		}
		if text[0] != '{' {
			asn, err := parseNumber(text)
			if err != nil {
				return nil, fmt.Errorf("line %d: %w", line, err)
			}
			networks[asn] = ""
			continue
		}
		rec, err := parseRecord(text)
		switch {
		case err != nil:
			return nil, fmt.Errorf("line %d: %w", line, err)
		case rec.Type == "metadata":
			promised = rec.Records
		default:
			records++
			networks[rec.ASN] = rec.Name
		}
	}
	switch {
	case sc.Err() != nil:
		return nil, sc.Err()
	case len(networks) == 0:
		return nil, errors.New("no networks")
	case records > 0 && promised < 0:
		return nil, errors.New("no line of metadata, so the file is cut")
	case records != promised && promised >= 0:
		return nil, fmt.Errorf("%d records where the metadata says %d, so the file is cut", records, promised)
	}
	return networks, nil
}

// parseNumber returns the number that a line of text begins with.
func parseNumber(line []byte) (uint32, error) {
	word := string(line)
	if i := strings.IndexAny(word, " \t;#,"); i >= 0 {
		word = word[:i]
	}
	asn := number(word)
	if asn == 0 {
		return 0, fmt.Errorf("%.40q: want the number of an autonomous system", word)
	}
	return asn, nil
}

// record is a line of ASN-DROP.
type record struct {
	ASN     uint32 `json:"asn"`
	Name    string `json:"asname"`
	Type    string `json:"type"`
	Records int    `json:"records"`
}

func parseRecord(line []byte) (rec record, err error) {
	if err := json.Unmarshal(line, &rec); err != nil {
		return rec, err
	}
	if rec.ASN == 0 && rec.Type != "metadata" {
		return rec, errors.New("a record without the number of an autonomous system")
	}
	return rec, nil
}
