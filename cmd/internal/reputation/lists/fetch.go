package lists

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"mime"
	"net/http"
	"net/url"
	"path"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/go-kit/log/level"
)

const (
	maxFetched   = 256 << 20 // bytes of a list by URL, as they come
	maxRedirects = 5
	fetchTime    = 5 * time.Minute // for an answer, from the first byte to the last
	tries        = 4               // at each fetch
	longestWait  = time.Minute     // between tries; who asks for more is asked again at the next fetch
	soonest      = 10 * time.Minute
	longestAge   = 7 * 24 * time.Hour // believed of max-age
	agent        = "spoa (+https://github.com/spoa-go/spoa)"
)

// origin is what is known of a URL.
type origin struct {
	mu           sync.Mutex // one fetch at a time; taken before Lists.mu; guards the rest
	etag         string
	lastModified string
	every        time.Duration // how often the list changes, as it says itself
	maxAge       time.Duration // how long the answer is good, as the server says
	retryAfter   time.Duration // what the server asked for when it refused
}

// remote fetches lists.
type remote struct {
	client *http.Client
	cache  cache
	pause  time.Duration // before the second try
	limit  time.Duration // for an answer
	most   int64         // bytes of an answer
}

func newRemote(o Options) remote {
	client := new(http.Client)
	if o.Client != nil {
		*client = *o.Client
	} else {
		t := http.DefaultTransport.(*http.Transport).Clone()
		t.ResponseHeaderTimeout = 30 * time.Second
		client.Transport = t
	}
	client.Timeout = 0
	client.CheckRedirect = func(r *http.Request, via []*http.Request) error {
		switch {
		case len(via) > maxRedirects:
			return backoff.Permanent(fmt.Errorf("more than %d redirects", maxRedirects))
		case via[0].URL.Scheme == "https" && r.URL.Scheme != "https":
			return backoff.Permanent(errors.New("redirected from https to http"))
		}
		return nil
	}
	return remote{client: client, cache: cache{o.Cache}, pause: cmp.Or(o.pause, time.Second), limit: cmp.Or(o.timeout, fetchTime),
		most: cmp.Or(o.most, maxFetched)}
}

// showURL returns a URL without its user and query, in which secrets may be, and
// the last part of its path.
func showURL(s string) (shown, base string) {
	u, err := url.Parse(s)
	if err != nil {
		return "URL", "URL"
	}
	base = path.Base(u.Path)
	if base == "/" || base == "." {
		base = u.Hostname()
	}
	u.User, u.RawQuery, u.Fragment = nil, "", ""
	return u.String(), base
}

// answer is what a server said.
type answer struct {
	same         bool // the list has not changed
	status       int
	etag         string
	lastModified string
	maxAge       time.Duration
	body         spool
}

// fetch asks for a list, several times if need be, unless it is still as o says.
func (r *remote) fetch(ctx context.Context, rawURL string, o *origin) (answer, error) {
	b := backoff.NewExponentialBackOff()
	b.InitialInterval = r.pause
	b.MaxInterval = longestWait
	last := 0
	a, err := backoff.Retry(ctx, func() (answer, error) {
		a, err := r.try(ctx, rawURL, o)
		last = a.status
		return a, err
	}, backoff.WithBackOff(b), backoff.WithMaxTries(tries), backoff.WithMaxElapsedTime(fetchTime))
	a.status = last
	var permanent *backoff.PermanentError // of the last try
	if errors.As(err, &permanent) {
		err = permanent.Unwrap()
	}
	return a, err
}

// try asks once.
func (r *remote) try(ctx context.Context, rawURL string, o *origin) (a answer, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, r.limit, fmt.Errorf("no whole answer within %v", r.limit))
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, rawURL, nil)
	if err != nil {
		return a, backoff.Permanent(hideURL(err))
	}
	req.Header.Set("User-Agent", agent)
	if o.etag != "" {
		req.Header.Set("If-None-Match", o.etag)
	}
	if o.lastModified != "" {
		req.Header.Set("If-Modified-Since", o.lastModified)
	}
	resp, err := r.client.Do(req)
	if err != nil {
		var badCert *tls.CertificateVerificationError
		if errors.As(err, &badCert) {
			return a, backoff.Permanent(hideURL(err))
		}
		return a, cmp.Or(context.Cause(ctx), hideURL(err))
	}
	defer resp.Body.Close()
	a.status = resp.StatusCode
	a.maxAge = maxAge(resp.Header)
	a.etag, a.lastModified = resp.Header.Get("ETag"), resp.Header.Get("Last-Modified")
	switch {
	case resp.StatusCode == http.StatusNotModified && o.etag+o.lastModified != "":
		a.same = true
		return a, nil
	case resp.StatusCode != http.StatusOK:
		return a, refusedStatus(resp, o)
	}
	if t, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type")); t == "text/html" {
		return a, backoff.Permanent(refuse(Malformed, errors.New("a web page, no list")))
	}
	a.body, err = r.cache.spool(rawURL, a, io.LimitReader(resp.Body, r.most+1))
	switch {
	case ctx.Err() != nil: // whatever the server made of the end
		a.body.discard()
		return a, context.Cause(ctx)
	case err == nil && a.body.size > r.most:
		a.body.discard()
		return a, backoff.Permanent(fmt.Errorf("more than %d MiB", r.most>>20))
	}
	return a, err
}

// refusedStatus returns the error of an answer without a list, and whether and
// when to try again with it.
func refusedStatus(resp *http.Response, o *origin) error {
	err := fmt.Errorf("status %s", resp.Status)
	code := resp.StatusCode
	o.retryAfter = parseRetryAfter(resp.Header.Get("Retry-After"))
	switch {
	case code != http.StatusTooManyRequests && code != http.StatusRequestTimeout && code < 500, o.retryAfter > longestWait:
		return backoff.Permanent(err)
	case o.retryAfter > 0:
		return fmt.Errorf("%w: %w", err, &backoff.RetryAfterError{Duration: o.retryAfter})
	}
	return err
}

// hideURL takes the URL, in which secrets may be, out of an error of net/http.
func hideURL(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

func parseRetryAfter(s string) time.Duration {
	if n, err := strconv.ParseUint(s, 10, 31); err == nil {
		return time.Duration(n) * time.Second
	}
	if t, err := http.ParseTime(s); err == nil {
		return max(0, time.Until(t))
	}
	return 0
}

func maxAge(h http.Header) time.Duration {
	for directive := range strings.SplitSeq(h.Get("Cache-Control"), ",") {
		if s, ok := strings.CutPrefix(strings.TrimSpace(directive), "max-age="); ok {
			if n, err := strconv.ParseUint(s, 10, 31); err == nil {
				return min(time.Duration(n)*time.Second, longestAge)
			}
		}
	}
	return 0
}

// openURL brings the list of s into force for the first time: from the cache if
// that is young enough, else from its server, else from the cache however old.
func (l *Lists) openURL(ctx context.Context, s *source) error {
	s.origin.mu.Lock()
	defer s.origin.mu.Unlock()
	kept, err := l.remote.cache.open(s.Path)
	if err == nil {
		err = l.take(s, kept.spool, kept.answer, kept.fetched)
		kept.close()
	}
	age := time.Since(kept.fetched)
	switch {
	case err == nil && age < l.interval(s):
		level.Info(l.logger).Log("list", s.name, "msg", "last copy used", "file", s.shown, "age", age.Round(time.Second))
		l.schedule(s, l.interval(s)-age)
		return nil
	case err == nil:
		if err := l.refreshLocked(ctx, s); err != nil {
			level.Warn(l.logger).Log("list", s.name, "msg", "not fetched, last copy used", "file", s.shown,
				"age", age.Round(time.Second), "err", err)
		}
		return ctx.Err()
	}
	return l.refreshLocked(ctx, s)
}

// take reads a list from body and puts it in force. The caller must hold
// origin.mu.
func (l *Lists) take(s *source, body spool, a answer, fetched time.Time) error {
	modified, err := http.ParseTime(a.lastModified)
	if err != nil {
		modified = fetched
	}
	var r result
	func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		c, err := parse(body.reader(), s.File, s.allow, s.shown, body.size)
		if r = l.accept(s, c, err, modified); r.err == nil {
			s.origin.every = c.every
			s.origin.maxAge, s.origin.etag, s.origin.lastModified = a.maxAge, a.etag, a.lastModified
			r.content = nil
			r.stats.Checked, r.stats.Status = fetched, a.status
			l.enforce([]result{r})
		}
	}()
	return l.report([]result{r})
}

// eachURL calls f for each list by URL, for all at once, and returns their errors.
func (l *Lists) eachURL(f func(*source) error) error {
	sources := *l.sources.Load()
	errs := make([]error, len(sources))
	var all sync.WaitGroup
	for i, s := range sources {
		if s.url() {
			all.Go(func() { errs[i] = f(s) })
		}
	}
	all.Wait()
	return errors.Join(errs...)
}

// tooSoon reports whether the server of s, or the list, has asked for a later
// fetch than now.
func (l *Lists) tooSoon(s *source) bool {
	s.origin.mu.Lock()
	defer s.origin.mu.Unlock()
	stats := s.stats.Load()
	if s.origin.retryAfter > 0 && time.Now().Before(stats.Next) {
		return true
	}
	return time.Since(stats.Checked) < max(s.origin.every, s.origin.maxAge)
}

// refresh fetches the list of s and puts it in force if it has changed.
func (l *Lists) refresh(ctx context.Context, s *source) error {
	s.origin.mu.Lock()
	defer s.origin.mu.Unlock()
	return l.refreshLocked(ctx, s)
}

func (l *Lists) refreshLocked(ctx context.Context, s *source) error {
	s.origin.retryAfter = 0
	a, err := l.remote.fetch(ctx, s.Path, &s.origin)
	now := time.Now()
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		err = fmt.Errorf("%s: %w", s.shown, err)
		l.mu.Lock()
		l.refused(s, err)
		l.mu.Unlock()
		l.answered(s, a.status, time.Time{})
		l.schedule(s, max(s.origin.retryAfter, min(soonest, l.interval(s))))
		return l.report([]result{{source: s, err: err}})
	case a.same:
		s.origin.maxAge = a.maxAge
		l.remote.cache.touch(s.Path, now)
		l.answered(s, a.status, now)
	default:
		if err = l.take(s, a.body, a, now); err != nil {
			a.body.discard()
			l.answered(s, a.status, time.Time{})
		} else if keepErr := a.body.keep(); keepErr != nil {
			level.Warn(l.logger).Log("list", s.name, "msg", "not kept in the cache", "file", s.shown, "err", keepErr)
		}
	}
	l.schedule(s, l.interval(s))
	return err
}

// answered notes what the server said, and when if it was good.
func (l *Lists) answered(s *source, status int, at time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	stats := *s.stats.Load()
	stats.Status = status
	if !at.IsZero() {
		stats.Checked, stats.Problem = at, ""
	}
	s.stats.Store(&stats)
}

// interval returns how long to wait from one fetch of s to the next: what the flag
// says, but no less than the list or its server ask for. The caller must hold origin.mu.
func (l *Lists) interval(s *source) time.Duration {
	return max(l.options.Refresh, s.origin.every, s.origin.maxAge)
}

// schedule sets when s is fetched next, up to a tenth later than after d, so that
// not all agents come at once.
func (l *Lists) schedule(s *source, d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	stats := *s.stats.Load()
	stats.Next = time.Now().Add(d + time.Duration(rand.Int64N(int64(d)/10+1)))
	s.stats.Store(&stats)
}

// keepFetching fetches s whenever that is due, until ctx ends.
func (l *Lists) keepFetching(ctx context.Context, s *source) {
	for {
		wait(ctx, time.Until(s.stats.Load().Next))
		if ctx.Err() != nil {
			return
		}
		_ = l.refresh(ctx, s) // logs
	}
}
