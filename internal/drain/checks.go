package drain

import (
	"hash/maphash"
	"slices"
	"time"
)

const (
	maxHosts      = 4096            // that are remembered
	maxEngines    = 64              // of a host that are counted
	keptGaps      = 16              // between health checks
	sharers       = 4               // backends, or processes, that may check from one address
	missedFall    = 3               // refused health checks that take a server out: HAProxy's default
	checkInterval = 2 * time.Second // between health checks: HAProxy's default
	checkWindow   = 5 * time.Minute // without a health check: they have ended
)

// Checks remembers, by host, how often health checks come, so that a drain can
// wait until HAProxy has missed enough of them. Only those of a host that also
// sends NOTIFYs count: a probe loses no request. The zero value is ready.
type Checks struct {
	hosts  map[string]*checker
	forgot bool
}

var engineSeed = maphash.MakeSeed()

// checker is a host that sends health checks, or NOTIFYs.
type checker struct {
	heard    time.Duration // when it last sent either
	last     time.Duration // when its last health check came
	checks   uint64
	gaps     [keptGaps]time.Duration // between the last health checks
	engines  map[uint64]bool         // hashes of the engine-ids, which may be long, that have sent NOTIFYs
	notifies bool
}

// Seen notes a health check.
func (cs *Checks) Seen(host string, now time.Duration) {
	k := cs.host(host, now)
	if gap := now - k.last; k.checks > 0 && gap < checkWindow {
		k.gaps[k.checks%keptGaps] = gap
	} else {
		k.gaps = [keptGaps]time.Duration{}
	}
	k.last = now
	k.checks++
}

// Notified notes that an engine of the host sends NOTIFYs.
func (cs *Checks) Notified(host, engine string, now time.Duration) {
	k := cs.host(host, now)
	k.notifies = true
	if k.engines == nil {
		k.engines = make(map[uint64]bool)
	}
	if len(k.engines) < maxEngines {
		k.engines[maphash.String(engineSeed, engine)] = true
	}
}

// host returns what is remembered of a host. When there are too many, the one
// that was not heard of for longest is forgotten.
func (cs *Checks) host(name string, now time.Duration) *checker {
	k := cs.hosts[name]
	if k == nil {
		if cs.hosts == nil {
			cs.hosts = make(map[string]*checker)
		}
		if len(cs.hosts) >= maxHosts {
			cs.forgetOldest()
		}
		k = new(checker)
		cs.hosts[name] = k
	}
	k.heard = now
	return k
}

func (cs *Checks) forgetOldest() {
	oldest, at := "", Never
	for name, k := range cs.hosts {
		if k.heard < at {
			oldest, at = name, k.heard
		}
	}
	delete(cs.hosts, oldest)
	cs.forgot = true
}

// Forgot reports whether a host was forgotten for want of room, so that one that
// is not known may send health checks nevertheless.
func (cs *Checks) Forgot() bool { return cs.forgot }

// interval estimates the time between two health checks of one HAProxy backend.
//
// The longest of the last gaps is nearest to it where several backends, or
// processes, check from one address. HAProxy spreads their checks evenly, so
// that even the longest gap may be a fraction of the interval: sharers of them
// are expected, and as many as there are engines that send NOTIFYs. But up to 3.0
// each thread has an engine-id of its own, so the estimate is raised no further
// than to HAProxy's default.
func (k *checker) interval() time.Duration {
	gap := slices.Max(k.gaps[:])
	if gap == 0 {
		return checkInterval
	}
	return max(gap, min(gap*time.Duration(max(sharers, len(k.engines))), checkInterval))
}

// Missed returns when the host must have missed missedFall health checks, 0 if
// it sends none, or none any more, or sends no NOTIFYs.
func (cs *Checks) Missed(host string, now time.Duration) time.Duration {
	k := cs.hosts[host]
	if k == nil || !k.notifies || k.checks == 0 {
		return 0
	}
	d := k.interval()
	if now-k.last >= 2*d+QuietTime {
		return 0 // it has stopped
	}
	return k.last + missedFall*d + QuietTime
}

// AllMissed returns when every host must have missed missedFall health checks,
// 0 if none is waited for.
func (cs *Checks) AllMissed(now time.Duration) (at time.Duration) {
	for name := range cs.hosts {
		at = max(at, cs.Missed(name, now))
	}
	return at
}
