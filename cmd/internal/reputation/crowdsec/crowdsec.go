// Package crowdsec follows the decisions that the local API of CrowdSec makes
// on addresses, ranges, countries and autonomous systems.
//
// It pulls the stream of decisions as bouncers do: all of them at first, then
// what is new and what was deleted. A decision ends when its time is over, also
// while the local API is down. After a pull that failed the next one asks for all
// decisions again, because the API has taken what was lost for delivered.
package crowdsec

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-kit/log"
	"github.com/go-kit/log/level"
	"github.com/spoa-go/spoa/cmd/internal/reputation"
)

const (
	name = "crowdsec"

	// DefaultInterval is the time between pulls that bouncers use.
	DefaultInterval = 10 * time.Second

	pullTimeout = time.Minute      // of one pull, including its body
	firstPause  = time.Second      // after a pull that failed; doubled up to the interval
	resyncAfter = time.Hour        // after which all decisions are pulled again, in case a delta was incomplete
	maxBody     = 512 << 20        // bytes
	userAgent   = "spoa/v0"        // the API wants a type and a version
	stalePulls  = 3                // intervals without a pull after which addresses without a decision are unknown
	minStale    = 30 * time.Second // at least so long
)

// Config says where decisions come from and what they are worth.
type Config struct {
	URL       string            // of the local API, such as http://127.0.0.1:8080
	Key       string            // of a bouncer
	Scores    Scores            // by type of decision; nil means the default
	Interval  time.Duration     // between pulls; 0 means DefaultInterval
	Logger    log.Logger        // nil discards
	Transport http.RoundTripper // nil means http.DefaultTransport
}

// Source is a reputation.Source of a local API's decisions.
type Source struct {
	Config
	stream   *url.URL
	client   *http.Client
	start    time.Time                      // what expiries count from, on the monotonic clock
	findings map[string]*reputation.Finding // by reason; guarded by pulling

	table atomic.Pointer[table] // nil before the first pull
	stale atomic.Bool           // no pull has succeeded for some time

	pulling sync.Mutex // one pull at a time; taken before mu
	synced  time.Time  // when all decisions were pulled last, zero if that must be done; guarded by pulling

	mu      sync.Mutex // guards what follows
	pulled  time.Time  // when the last pull succeeded
	problem string     // of the last pull; empty if it succeeded
}

// New returns a Source that knows nothing until Pull or Run is called.
func New(c Config) (*Source, error) {
	u, err := url.Parse(c.URL)
	switch {
	case err != nil:
		return nil, err
	case u.Scheme != "http" && u.Scheme != "https" || u.Host == "":
		return nil, fmt.Errorf("URL %q: want http://host:port or https://host:port", c.URL)
	case c.Key == "":
		return nil, errors.New("no key of the local API: make one with cscli bouncers add")
	case strings.ContainsFunc(c.Key, func(r rune) bool { return r <= ' ' || r > '~' }):
		return nil, errors.New("the key of the local API has spaces or other characters that no key has")
	}
	if c.Interval <= 0 {
		c.Interval = DefaultInterval
	}
	if c.Logger == nil {
		c.Logger = log.NewNopLogger()
	}
	if c.Scores == nil {
		c.Scores = DefaultScores()
	}
	return &Source{
		Config: c, stream: u.JoinPath("v1/decisions/stream"), start: time.Now(),
		findings: make(map[string]*reputation.Finding),
		client: &http.Client{
			Transport:     c.Transport,
			Timeout:       pullTimeout,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }, // the key stays here
		},
	}, nil
}

// Judge implements reputation.Source. It never waits.
func (s *Source) Judge(_ context.Context, sub reputation.Subject) reputation.Finding {
	t := s.table.Load()
	if t == nil {
		return reputation.Finding{Source: name, State: reputation.Unknown}
	}
	if f := t.worst(&sub, s.start); f != nil {
		return *f
	}
	if s.stale.Load() {
		return reputation.Finding{Source: name, State: reputation.Unknown}
	}
	return reputation.Finding{Source: name}
}

// Excludes implements reputation.Excluder.
func (s *Source) Excludes(addr netip.Addr) bool {
	t := s.table.Load()
	return t != nil && t.excludes(addr) && !s.stale.Load()
}

// Status implements reputation.Reporter.
func (s *Source) Status() reputation.Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := reputation.Status{Name: name, Kind: name, Updated: s.pulled, Problem: s.problem}
	if t := s.table.Load(); t != nil {
		st.Entries = t.size()
	} else if st.Problem == "" {
		st.Problem = "no decisions pulled yet"
	}
	return st
}

// Run pulls until ctx ends.
func (s *Source) Run(ctx context.Context) error {
	pause, failures := s.Interval, 0
	if s.table.Load() == nil {
		pause = 0
	}
	for {
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		case <-t.C:
		}
		pause = s.Interval
		if s.Pull(ctx) == nil {
			failures = 0
			continue
		}
		pause = min(firstPause<<min(failures, 16), pause)
		failures++
	}
}

// Pull asks the local API once. What it says is in force when Pull returns. An
// error is logged, unless it is the same as before, and what was known stays in
// force.
func (s *Source) Pull(ctx context.Context) error {
	s.pulling.Lock()
	defer s.pulling.Unlock()
	now := time.Now()
	startup := now.Sub(s.synced) > resyncAfter
	t, err := s.pull(ctx, startup)
	if err != nil {
		s.synced = time.Time{}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return s.failed(fmt.Errorf("%s: %w", name, err))
	}
	if startup {
		s.synced = now
	}
	s.table.Store(t)
	if recovered := s.succeeded(now); startup || recovered {
		level.Info(s.Logger).Log("msg", "decisions pulled", "source", name, "count", t.size(), "ignored", t.ignored, "took", time.Since(now))
	}
	return nil
}

// failed notes an error and returns it.
func (s *Source) failed(err error) error {
	s.mu.Lock()
	again := s.problem == err.Error()
	s.problem = err.Error()
	s.mu.Unlock()
	if !again {
		level.Error(s.Logger).Log("msg", "cannot pull decisions, those known stay in force until they expire", "err", err)
	}
	return err
}

// succeeded notes a pull and reports whether the one before had failed.
func (s *Source) succeeded(now time.Time) (recovered bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	recovered = s.problem != ""
	s.pulled, s.problem = now, ""
	s.stale.Store(false)
	time.AfterFunc(max(stalePulls*s.Interval, minStale), func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.pulled.Equal(now) {
			s.stale.Store(true)
		}
	})
	return recovered
}

// pull returns the table with what the local API has to say.
func (s *Source) pull(ctx context.Context, startup bool) (*table, error) {
	u := *s.stream
	u.RawQuery = fmt.Sprintf("startup=%t&dedup=false&scopes=ip,range,country,as", startup)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("X-Api-Key", s.Key)
	req.Header.Set("User-Agent", userAgent)
	req.Header.Set("Accept", "application/json")
	resp, err := s.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, refusal(resp)
	}
	old, t := s.table.Load(), newTable()
	if !startup {
		t = old
	}
	answered := time.Since(s.start)
	body := &io.LimitedReader{R: resp.Body, N: maxBody}
	err = decode(body, func(deleted bool, d *decision) {
		if t == old {
			t = old.clone()
		}
		switch {
		case !deleted:
			s.add(t, d, answered)
		case !startup: // at startup, those that are over
			t.remove(d)
		}
	})
	switch {
	case err != nil && body.N <= 0:
		return nil, fmt.Errorf("answer of more than %d bytes", maxBody)
	case err != nil:
		return nil, err
	}
	if t != old {
		t.seal()
	}
	return t, nil
}

// refusal makes an error of an answer that is none.
func refusal(resp *http.Response) error {
	if resp.StatusCode == http.StatusForbidden || resp.StatusCode == http.StatusUnauthorized {
		return fmt.Errorf("%s: want a key made with cscli bouncers add", resp.Status)
	}
	b, _ := io.ReadAll(io.LimitReader(resp.Body, 200)) // only to say more
	return fmt.Errorf("%s: %q", resp.Status, b)
}

// add puts a decision into t that was handed out at the time answered.
func (s *Source) add(t *table, d *decision, answered time.Duration) {
	if d.Simulated {
		return
	}
	left, err := time.ParseDuration(d.Duration)
	if err != nil {
		t.ignored++
		return
	}
	if left > 0 {
		t.add(d, inForce{id: d.ID, until: answered + left, finding: s.finding(d)})
	}
}

// finding returns the Finding of decisions of that type and scenario.
func (s *Source) finding(d *decision) *reputation.Finding {
	kind := reputation.Text(strings.ToLower(d.Type))
	reason := reputation.Text(fmt.Sprintf("%s: %s for %s", name, kind, d.Scenario))
	f := s.findings[reason]
	if f == nil {
		f = &reputation.Finding{Source: name, State: reputation.Listed, Score: s.Scores.of(kind), Reason: reason, Decision: kind}
		if len(s.findings) < maxFindings {
			s.findings[reason] = f
		}
	}
	return f
}
