package drain

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

const ms = time.Millisecond

// bench is a host whose connections a test describes, and a clock.
type bench struct {
	Host
	t     *testing.T
	now   time.Duration
	conns []*Conn
	held  map[*Conn]time.Duration // since when
	ended []*Conn
}

func newBench(t *testing.T, h Host, looks ...Look) *bench {
	b := &bench{Host: h, t: t, now: time.Hour, held: make(map[*Conn]time.Duration)}
	if b.From > 0 {
		b.From += b.now
	}
	if b.Until > 0 {
		b.Until += b.now
	}
	for _, l := range looks {
		b.add(l)
	}
	return b
}

// add adds a connection. The times of looks are ages.
func (b *bench) add(l Look) *Conn {
	l.LastUsed = b.now - l.LastUsed
	c := &Conn{Look: l}
	b.conns = append(b.conns, c)
	return c
}

// notify receives n NOTIFYs on c, which are answered at once.
func (b *bench) notify(c *Conn, n uint64) {
	c.Notifies += n
	c.Answered += n
	c.LastUsed = b.now
}

// step steps, and carries out the verdicts, which it returns.
func (b *bench) step() (verdicts []Verdict, next time.Duration) {
	b.t.Helper()
	next = b.Step(b.now, b.conns)
	kept := b.conns[:0:0]
	for _, c := range b.conns {
		verdicts = append(verdicts, c.Verdict)
		since, held := b.held[c]
		switch c.Verdict {
		case Hold:
			if held {
				b.t.Errorf("%v: held again", b.now-time.Hour)
			}
			b.held[c] = b.now
		case Release, Part:
			delete(b.held, c)
		}
		if held && b.now-since > holdFor+Tick(len(b.conns)) {
			b.t.Errorf("%v: held for %v, want %v at most", b.now-time.Hour, b.now-since, holdFor)
		}
		if c.Verdict == Part {
			b.ended = append(b.ended, c)
			continue
		}
		kept = append(kept, c)
	}
	b.conns = kept
	return verdicts, next
}

// run steps until every connection is parted or d is over, and calls traffic
// before each step.
func (b *bench) run(d time.Duration, traffic func()) (took time.Duration) {
	b.t.Helper()
	start := b.now
	for len(b.conns) > 0 && b.now-start < d {
		if traffic != nil {
			traffic()
		}
		_, next := b.step()
		if next <= b.now {
			b.t.Fatalf("%v: the next look is not later", b.now-time.Hour)
		}
		b.now = min(next, b.now+ms)
	}
	return b.now - start
}

// eachHold returns what receives n NOTIFYs on c in each hold, for run.
func (b *bench) eachHold(c *Conn, n uint64) func() {
	rounds := -1
	return func() {
		if b.holding && b.rounds != rounds {
			rounds = b.rounds
			b.notify(c, n)
		}
	}
}

func (b *bench) want(want ...Verdict) (next time.Duration) {
	b.t.Helper()
	have, next := b.step()
	if !slices.Equal(want, have) {
		b.t.Errorf("%v: want %v, have %v", b.now-time.Hour, want, have)
	}
	return next
}

// idle is a connection that was used a while ago, used one that was just now.
var (
	idle  = Look{Agreed: true, Notifies: 5, Answered: 5, LastUsed: 2 * QuietTime}
	used  = Look{Agreed: true, Notifies: 5, Answered: 5}
	busy  = Look{Agreed: true, Notifies: 5, Answered: 4, LastUsed: 2 * QuietTime}
	fresh = Look{Agreed: true}
	mute  = Look{}
)

func TestEarly(t *testing.T) {
	b := newBench(t, Host{From: 3 * time.Second, Rounds: true}, idle, used, busy, fresh, mute)
	if want, have := b.From, b.want(Keep, Keep, Keep, Keep, Keep); want != have {
		t.Errorf("want the next look at %v, have %v", want, have)
	}
}

func TestIdle(t *testing.T) {
	b := newBench(t, Host{}, idle, used, busy, fresh, mute)
	if want, have := b.now+slowLook, b.want(Part, Keep, Keep, Keep, Keep); want != have {
		t.Errorf("want the next look at %v, have %v", want, have)
	}
	b.now += QuietTime
	if want, have := b.now+slowLook, b.want(Part, Keep, Part, Part); want != have {
		t.Errorf("want the next look at %v, have %v", want, have)
	}
	b.conns[0].Answered++
	if want, have := Never, b.want(Part); want != have {
		t.Errorf("want no more look, have one at %v", have)
	}
}

// Many connections that become idle one after the other are looked at together.
func TestIdleLooks(t *testing.T) {
	b := newBench(t, Host{})
	for i := range 1000 {
		l := used
		l.LastUsed = time.Duration(i) * time.Microsecond
		b.add(l)
	}
	looks := 0
	b.now += QuietTime - 500*time.Microsecond
	for len(b.conns) > 0 {
		_, next := b.step()
		b.now = next
		looks++
	}
	if most := 1000/perLook + 2; looks > most {
		t.Errorf("want %d looks at the most, have %d", most, looks)
	}
}

// Thousands that could be parted at once are parted few at a time, whatever the
// reason, and all of them soon.
func TestFewAtATime(t *testing.T) {
	for name, tt := range map[string]struct {
		host    Host
		look    Look
		n, most int
	}{
		"idle":           {Host{}, idle, 2 * manyIdle, perLook},
		"together":       {Host{Rounds: true}, idle, manyIdle, perLook},
		"thousands":      {Host{Rounds: true}, idle, 2 * manyIdle, perLook},
		"thousands used": {Host{Rounds: true}, used, 2 * manyIdle, perLook},
		"last":           {Host{Until: 1}, busy, 2 * manyIdle, perLastLook},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, tt.host)
			for range tt.n {
				b.add(tt.look)
			}
			most, before := 0, 0
			took := b.run(10*time.Second, func() {
				most = max(most, len(b.ended)-before)
				before = len(b.ended)
			})
			if most > tt.most {
				t.Errorf("want %d parted at a look at most, have %d", tt.most, most)
			}
			if len(b.ended) < tt.n || took > 20*(holdFor+pause) {
				t.Errorf("want all %d parted soon, have %d after %v", tt.n, len(b.ended), took)
			}
		})
	}
}

// Thousands of connections are looked at seldom: each look takes time.
func TestSeldomLooks(t *testing.T) {
	b := newBench(t, Host{Rounds: true})
	for range 3000 {
		b.add(used)
	}
	looks := 0
	for start := b.now; b.now-start < patienceMany*(holdFor+pause); looks++ {
		b.notify(b.conns[looks], 1)
		b.now = b.Step(b.now, b.conns)
	}
	if most := patienceMany * 15; looks > most {
		t.Errorf("want up to %d looks in %d rounds, have %d", most, patienceMany, looks)
	}
}

// Of more than a thousand connections those that are idle are parted without a
// hold, so that those in use are answered meanwhile.
func TestThousands(t *testing.T) {
	for n, want := range map[int]Verdict{manyIdle: Hold, manyIdle + 1: Part} {
		b := newBench(t, Host{Rounds: true}, used, busy)
		for range n - 2 {
			b.add(idle)
		}
		verdicts, _ := b.step()
		for i, v := range verdicts[:2+perLook] {
			if inUse := i < 2; inUse && want == Part && v != Keep || (!inUse || want == Hold) && v != want {
				t.Errorf("%d connections: want %v for those that are idle, have %v for number %d", n, want, v, i)
			}
		}
	}
}

// Connections that are idle while HAProxy uses another one often are parted
// without a hold.
func TestSpare(t *testing.T) {
	for _, tt := range []struct {
		name     string
		after    time.Duration // From
		notifies uint64        // of one connection in that time
		want     bool
	}{
		{"often", QuietTime, often, true},
		{"not often enough", QuietTime, often - 1, false},
		{"often for long", 5 * QuietTime, 5 * often, true},
		{"not often enough for long", 5 * QuietTime, 5*often - 1, false},
		{"not seen for long enough", QuietTime - 1, 100 * often, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t, Host{From: tt.after, Rounds: true}, used, idle, idle)
			b.step()
			b.now += tt.after
			b.notify(b.conns[0], tt.notifies)
			if !tt.want {
				b.want(Hold, Hold, Hold)
				return
			}
			b.want(Keep, Keep, Keep)
			b.evenly(b.conns[0], evenFor-ms, ms)
			b.now += ms
			b.notify(b.conns[0], 1)
			b.want(Keep, Part, Part)
		})
	}
}

// evenly receives a NOTIFY on c each time that the interval is over, for d, and
// expects that nothing becomes of it.
func (b *bench) evenly(c *Conn, d, interval time.Duration) {
	b.t.Helper()
	for end := b.now + d; b.now < end; {
		b.now += interval
		b.notify(c, 1)
		b.want(make([]Verdict, len(b.conns))...)
	}
}

// newSpareBench returns a host at its From, with a connection that HAProxy uses
// often, and a spare one.
func newSpareBench(t *testing.T) *bench {
	b := newBench(t, Host{From: QuietTime, Rounds: true}, used, idle)
	b.want(Keep, Keep)
	b.now = b.From
	b.notify(b.conns[0], often)
	b.want(Keep, Keep)
	return b
}

// After a pause HAProxy may have much to send, for which it uses spare connections.
func TestSparePause(t *testing.T) {
	for interval, want := range map[time.Duration]Verdict{longPause: Part, longPause + ms: Keep} {
		b := newSpareBench(t)
		b.evenly(b.conns[0], evenFor-longPause, interval)
		b.now += longPause
		b.notify(b.conns[0], 1)
		b.want(Keep, want)
	}
}

// It is judged again and again whether HAProxy uses the connections in turn, and
// none is spare in a hold.
func TestSpareAgain(t *testing.T) {
	b := newBench(t, Host{From: QuietTime - holdFor/2, Rounds: true}, Look{Agreed: true, Notifies: 1e9, Answered: 1e9}, idle)
	b.want(Keep, Keep)
	b.now = b.From
	b.notify(b.conns[0], 100)
	b.want(Hold, Hold)
	b.evenly(b.conns[0], holdFor-ms, ms)
	b.now += ms
	b.want(Release, Release)
	b.now += pause // HAProxy may not run
	b.want(Keep, Keep)
	b.evenly(b.conns[0], evenFor, ms)
	b.now += ms
	b.notify(b.conns[0], 1)
	b.want(Keep, Part)
	b.add(fresh)
	b.now += QuietTime
	b.notify(b.conns[0], 1)
	b.want(Hold, Hold)
}

// A host that is not seen to run has no spare connections: it may be waiting for
// another process to accept new ones.
func TestSpareSilence(t *testing.T) {
	b := newSpareBench(t)
	b.evenly(b.conns[0], evenFor-ms, ms)
	b.now += ms
	b.notify(b.conns[0], 1)
	b.want(Keep, Part)
	b.add(Look{Agreed: true, LastUsed: 2 * QuietTime})
	b.now += maxWait - ms
	b.notify(b.conns[0], 1)
	b.want(Keep, Keep)
	b.now += ms
	b.notify(b.conns[0], 1)
	b.want(Hold, Hold)
}

// When little time is left, what is spare is parted though no NOTIFY comes.
func TestSpareLast(t *testing.T) {
	b := newBench(t, Host{From: QuietTime, Rounds: true}, used, idle)
	b.want(Keep, Keep)
	b.now = b.From - ms
	b.notify(b.conns[0], often)
	b.want(Keep, Keep)
	b.now += ms
	b.want(Keep, Keep)
	b.now += ms
	b.Until = b.now + 100*ms
	b.want(Keep, Part)
}

// Of many, some that have answers may be parted together, but only those that are
// ready.
func TestPartsOnlyReady(t *testing.T) {
	b := newBench(t, Host{Rounds: true}, used)
	for range oneIn {
		b.add(fresh)
	}
	c := b.conns[0]
	asks := b.eachHold(c, 5)
	for len(b.ended) == 0 {
		b.run(ms, asks)
	}
	if !slices.Equal(b.ended, []*Conn{c}) {
		t.Errorf("want the connection parted that has answers, have %d parted", len(b.ended))
	}
}

// A connection is parted, whatever the others do, when as many NOTIFYs wait on it
// as HAProxy allows itself.
func TestFull(t *testing.T) {
	for n, want := range map[uint64]Verdict{window - 1: Keep, window: Part, window + 1: Keep} {
		b := newBench(t, Host{Rounds: true}, used, busy)
		b.want(Hold, Hold)
		b.notify(b.conns[0], n)
		for range fullLooks {
			b.now += ms
			b.want(Keep, Keep)
		}
		b.now += ms
		b.want(want, Keep)
	}
}

// What HAProxy cannot send on a connection that has just become full, or was
// parted, it sends on one that was idle.
func TestFullFirst(t *testing.T) {
	b := newBench(t, Host{Rounds: true}, used, idle)
	b.rounds = compared // enough to compare
	b.want(Hold, Hold)
	b.now += quiet
	b.notify(b.conns[0], window)
	b.want(Keep, Keep)
	for range fullLooks - 1 {
		b.now += ms
		b.want(Keep, Keep)
	}
	b.now += ms
	b.want(Part, Keep)
	for range quietLooks - 1 {
		b.now += (quiet - ms) / quietLooks
		b.want(Keep)
	}
	b.now = b.conns[0].since + quiet
	b.want(Part)
}

// A host all of whose connections are idle is parted at once.
func TestAllIdle(t *testing.T) {
	b := newBench(t, Host{Rounds: true}, idle, idle, mute)
	b.conns[2].LastUsed -= QuietTime
	b.want(Part, Part, Part)
}

func TestReady(t *testing.T) {
	for _, tt := range []struct {
		name  string
		look  Look
		later func(b *bench, c *Conn) // before each further look
		ready bool                    // after quiet and quietLooks
	}{
		{"quiet", used, nil, true},
		{"in flight", busy, nil, false},
		{"half a frame", Look{Agreed: true, Notifies: 1, Answered: 1, Partial: true}, nil, false},
		{"half a frame for long", Look{Agreed: true, Notifies: 1, Answered: 1, Partial: true, LastUsed: QuietTime}, nil, true},
		{"asks again", used, func(b *bench, c *Conn) { b.notify(c, 1) }, false},
		{"new, not yet used", fresh, nil, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t, Host{Rounds: true}, tt.look, busy) // busy keeps it from being parted
			c := b.conns[0]
			b.want(Hold, Hold)
			for range quietLooks {
				b.now += quiet / quietLooks
				if tt.later != nil {
					tt.later(b, c)
				}
				b.want(Keep, Keep)
			}
			if c.ready != tt.ready {
				t.Errorf("want ready %v, have %v", tt.ready, c.ready)
			}
		})
	}
}

// Silence counts only if it was looked at often enough: a process that has not
// run has seen nothing.
func TestReadyLooks(t *testing.T) {
	b := newBench(t, Host{Rounds: true}, used, busy)
	c := b.conns[0]
	b.want(Hold, Hold)
	for range quietLooks - 1 {
		b.now += quiet / 2
		b.want(Keep, Keep)
	}
	if c.ready {
		t.Errorf("ready after %d looks, want %d", quietLooks-1, quietLooks)
	}
}

// With as many NOTIFYs waiting as HAProxy allows itself it sends no more.
func TestReadyWindow(t *testing.T) {
	for n, want := range map[uint64]bool{window - 1: false, window + 1: true} { // with window it is parted at once
		b := newBench(t, Host{Rounds: true}, used, busy)
		c := b.conns[0]
		b.want(Hold, Hold)
		b.notify(c, n)
		for range fullLooks {
			b.now += ms
			b.want(Keep, Keep)
			if c.ready {
				t.Errorf("%d waiting: ready after %d looks, want %d", n, c.looks, fullLooks)
			}
		}
		b.now += ms
		b.want(Keep, Keep)
		if c.ready != want {
			t.Errorf("%d waiting: want ready %v, have %v", n, want, c.ready)
		}
	}
}

// A new connection on which nothing was sent yet is given more time: HAProxy
// opened it to send something.
func TestReadyNew(t *testing.T) {
	b := newBench(t, Host{Rounds: true}, fresh, busy)
	c := b.conns[0]
	b.want(Hold, Hold)
	for b.now < time.Hour+quietNew-ms {
		b.now += ms
		b.want(Keep, Keep)
	}
	if c.ready {
		t.Errorf("ready after %v, want %v", quietNew-ms, quietNew)
	}
	b.now += ms
	b.want(Keep, Keep)
	if !c.ready {
		t.Errorf("not ready after %v", quietNew)
	}
}

// A connection that was never used does not hold up its host, nor is it held for
// ever.
func TestNeverUsed(t *testing.T) {
	b := newBench(t, Host{Rounds: true}, fresh)
	if took := b.run(10*time.Second, nil); took > QuietTime+holdFor+pause {
		t.Errorf("want it parted within %v, have %v", QuietTime+holdFor+pause, took)
	}
}

// A HAProxy that falls silent may be waiting for the CPU: only QuietTime of
// silence proves that it sends nothing.
func TestSilence(t *testing.T) {
	b := newBench(t, Host{Rounds: true}, used, used)
	if b.run(QuietTime-ms, nil); len(b.ended) > 0 {
		t.Errorf("want none parted, have %d", len(b.ended))
	}
	if b.run(holdFor+pause, nil); len(b.ended) < 2 {
		t.Errorf("want both parted, have %d", len(b.ended))
	}
}

// Rounds in which nothing waited do not count as rounds to compare with.
func TestSilentRounds(t *testing.T) {
	b := newBench(t, Host{Rounds: true}, used, used)
	c := b.conns[0]
	b.run(holdFor+pause, b.eachHold(c, 5))
	b.run(compared*(holdFor+pause), nil)
	if b.run(holdFor+pause, b.eachHold(c, 4)); len(b.ended) > 0 {
		t.Errorf("4 wait, and 5 did in the last round with any: want none parted, have %d", len(b.ended))
	}
	if b.run(holdFor+pause, b.eachHold(c, 5)); len(b.ended) != 2 {
		t.Errorf("5 wait: want both parted, have %d", len(b.ended))
	}
}

func TestRelease(t *testing.T) {
	b := newBench(t, Host{Rounds: true}, used, busy)
	b.want(Hold, Hold)
	b.now += holdFor - ms
	b.want(Keep, Keep)
	b.now += ms
	if want, have := b.now+pause, b.want(Release, Release); want != have {
		t.Errorf("want the next look at %v, have %v", want, have)
	}
	b.now += pause - ms
	b.want(Keep, Keep)
	b.now += ms
	b.want(Hold, Hold)
}

// Connections are parted only when as many NOTIFYs wait as in the fullest of the
// last rounds.
func TestTogether(t *testing.T) {
	for _, tt := range []struct {
		waiting []uint64 // in each round; the round in which it is parted is the last
		parted  int      // -1: never
	}{
		{[]uint64{1, 1, 1}, 2},
		{[]uint64{16, 15, 14, 14}, 3},
		{[]uint64{18, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9}, -1},
		{[]uint64{18, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9}, 11},
		{[]uint64{1, 2, 3, 3}, 2},
		{[]uint64{3, 2, 1, 3, 2, 1}, 3},
		{[]uint64{4, 3, 2, 1}, -1},
	} {
		t.Run(fmt.Sprint(tt.waiting), func(t *testing.T) {
			b := newBench(t, Host{Rounds: true}, used)
			have := -1
			for round, n := range tt.waiting {
				b.want(Hold)
				b.notify(b.conns[0], n)
				for b.holding && len(b.conns) > 0 {
					b.now += ms
					b.step()
				}
				if len(b.conns) == 0 {
					have = round
					break
				}
				b.now += pause
			}
			if have != tt.parted {
				t.Errorf("want it parted in round %d, have %d", tt.parted, have)
			}
		})
	}
}

// What waited on a connection that was parted is not expected in the next rounds.
func TestTogetherLeft(t *testing.T) {
	b := newBench(t, Host{Rounds: true}, used, used)
	first, second := b.eachHold(b.conns[0], 10), b.eachHold(b.conns[1], 10)
	var rounds []int // in which one was parted
	b.run(time.Minute, func() {
		if len(b.ended) > len(rounds) {
			rounds = append(rounds, b.rounds)
		}
		first()
		second()
	})
	if rounds = append(rounds, b.rounds); !slices.Equal(rounds, []int{2, 3}) {
		t.Errorf("want one parted in round 2 and one in round 3, have %v", rounds)
	}
}

// Those without answers are parted first, then one that has some; the others
// have to be quiet anew.
func TestOneByOne(t *testing.T) {
	b := newBench(t, Host{Rounds: true}, used, used, used)
	asks := b.conns[:2]
	parted := map[*Conn]time.Duration{}
	b.run(10*time.Second, func() {
		for _, c := range b.ended {
			if _, ok := parted[c]; !ok {
				parted[c] = b.now
			}
		}
		for _, c := range asks { // whoever is answered asks again
			if _, held := b.held[c]; !held || c.Answered == c.base {
				if !slices.Contains(b.ended, c) {
					b.notify(c, 1)
				}
			}
		}
	})
	if len(b.ended) != 3 {
		t.Fatalf("want 3 parted, have %d", len(b.ended))
	}
	if slices.Contains(asks, b.ended[0]) {
		t.Error("want the one without answers parted first")
	}
	if d := parted[b.ended[1]] - parted[b.ended[0]]; d < quiet {
		t.Errorf("want %v between the first and the second, have %v", quiet, d)
	}
}

// A host that is never quiet is parted after some rounds, while the answers of
// the others are held.
func TestBold(t *testing.T) {
	b := newBench(t, Host{Rounds: true}, used, used)
	noisy, other := b.conns[0], b.conns[1]
	took := b.run(time.Minute, func() {
		if len(b.conns) == 2 && b.now%(10*ms) == 0 {
			b.notify(noisy, 1)
		}
		if len(b.conns) == 2 && b.now%(QuietTime/2) == 0 { // or it would be spare
			b.notify(other, 1)
		}
	})
	if rounds := holdFor + pause; took < patience*rounds || took > (patience+compared+1)*rounds {
		t.Errorf("want it to take about %v, have %v", patience*rounds, took)
	}
	if b.ended[0] == noisy {
		t.Error("want the quiet one parted first")
	}
}

// The connections of a bold hold that have answers are parted in a later one than
// those that have none.
func TestBoldAnswers(t *testing.T) {
	b := newBench(t, Host{Rounds: true}, used, used)
	asks, silent := b.conns[0], b.conns[1]
	var noisy []*Conn
	for range boldParts {
		noisy = append(noisy, b.add(used))
	}
	each := b.eachHold(asks, 1)
	var at []int // rounds
	b.run(2*patience*(holdFor+pause), func() {
		each()
		if b.now%(5*ms) == 0 {
			for _, c := range noisy {
				b.notify(c, 1)
			}
		}
		for len(at) < len(b.ended) {
			at = append(at, b.rounds)
		}
	})
	if !slices.Equal(b.ended, []*Conn{silent, asks}) || len(at) < 2 || at[0] == at[1] {
		t.Errorf("want the one without answers parted, then in a later round the other: rounds %v", at)
	}
}

// Many connections that are used whether or not others wait for their answers
// are parted within some rounds more, though none is quiet in the end.
func TestBoldMany(t *testing.T) {
	const n = 1000
	b := newBench(t, Host{Rounds: true})
	for range n {
		b.add(used)
	}
	i := 0
	took := b.run(time.Minute, func() {
		for range 2 {
			i++
			b.notify(b.conns[i%len(b.conns)], 1)
		}
	})
	if most := (2*patience + 3*boldParts) * (holdFor + pause); took > most {
		t.Errorf("want it to take %v at most, have %v", most, took)
	}
}

// When little time is left, those that are ready are parted before all are.
func TestLast(t *testing.T) {
	b := newBench(t, Host{Rounds: true, Until: 100 * ms}, busy, used, idle, idle, mute, fresh)
	stuck, noisy := b.conns[0], b.conns[1]
	took := b.run(time.Second, func() { b.notify(noisy, 1) })
	if want := 100 * ms; took < want || took > want+ms {
		t.Errorf("want all parted after %v, have %v", want, took)
	}
	if i := slices.Index(b.ended, stuck); i < 2 {
		t.Errorf("want those that are ready parted first, have them after %d others", i)
	}
}

// Then those with and those without answers are parted in one round.
func TestLastBoth(t *testing.T) {
	b := newBench(t, Host{Rounds: true, Until: time.Second}, busy, used, used)
	asks, silent := b.conns[1], b.conns[2]
	b.run(holdFor, b.eachHold(asks, 1))
	if !slices.Contains(b.ended, asks) || !slices.Contains(b.ended, silent) {
		t.Errorf("want both that are ready parted, have %d", len(b.ended))
	}
}

// A connection without a HELLO does not hold up the others.
func TestMute(t *testing.T) {
	b := newBench(t, Host{Rounds: true}, used, mute)
	asks := b.conns[0]
	b.run(10*time.Second, nil)
	if len(b.ended) != 2 || b.ended[0] != asks {
		t.Errorf("want the one in use parted first, then the other")
	}
}

func TestVerdictString(t *testing.T) {
	var all []string
	for v := Keep; v <= Part; v++ {
		all = append(all, v.String())
	}
	if want, have := "keep hold release part", strings.Join(all, " "); want != have {
		t.Errorf("want %q, have %q", want, have)
	}
}
