package pace

import (
	"testing"
	"time"
)

func TestPace(t *testing.T) {
	const quick, slow = SlowCall, SlowCall + 1
	type step func(p *Pace)
	batch := func(calls int, each time.Duration, waited bool) step {
		return func(p *Pace) { p.Batch(calls, time.Duration(calls)*each, waited) }
	}
	stall := step((*Pace).Stalled)
	for _, tt := range []struct {
		name  string
		steps []step
		want  int // NOTIFYs spread then
	}{
		{"new", nil, 0},
		{"quick", []step{batch(20, quick, true)}, 0},
		{"one slow batch", []step{batch(20, slow, true)}, 0},
		{"two slow batches", []step{batch(20, slow, true), batch(1, slow, true)}, SpreadRun},
		{"nobody waited", []step{batch(1, slow, false), batch(1, slow, false), batch(1, slow, false)}, 0},
		{"a quick one between", []step{batch(20, slow, true), batch(1, quick, true), batch(20, slow, true)}, 0},
		{"stalled at once", []step{stall}, SpreadRun},
		{"stalled once in a while", []step{batch(StallRun, quick, true), stall, batch(StallRun, quick, true), stall}, 0},
		{"stalled twice", []step{batch(StallRun, quick, true), stall, batch(StallRun-1, quick, true), stall}, SpreadRun},
	} {
		var p Pace
		for _, step := range tt.steps {
			step(&p)
		}
		have := 0
		for !p.Inline() {
			have++
		}
		if tt.want != have {
			t.Errorf("%s: want %d spread, have %d", tt.name, tt.want, have)
		}
		if !p.Inline() {
			t.Errorf("%s: want calls inline from then on", tt.name)
		}
	}

	// Is the call that is tried slow, the next ones are spread again; is it
	// quick, that was all.
	for _, tried := range []struct {
		step step
		want int
	}{
		{stall, SpreadRun}, {batch(1, slow, true), SpreadRun}, {batch(1, quick, true), 0},
	} {
		var p Pace
		batch(20, slow, true)(&p)
		batch(20, slow, true)(&p)
		for !p.Inline() {
		}
		tried.step(&p)
		if want, have := tried.want, p.spread; want != have {
			t.Errorf("after a run of spread ones: want %d more, have %d", want, have)
		}
	}
}

func TestSpread(t *testing.T) {
	var p Pace
	p.Spread(2)
	for i, want := range []bool{false, false, true, true} {
		if have := p.Inline(); want != have {
			t.Errorf("NOTIFY %d: want inline %v, have %v", i, want, have)
		}
	}
}
