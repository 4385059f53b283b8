package spoa

import (
	"context"
	"fmt"
	"math"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
)

// fragments cuts payload into frames, behind each of the cuts.
func fragments(stream, id uint64, payload string, cuts ...int) (frames []string) {
	begin, kind := 0, byte(frameNotify)
	for _, cut := range append(cuts, len(payload)) {
		flags := uint32(0)
		if cut == len(payload) {
			flags = flagFIN
		}
		frames = append(frames, rawFrame(kind, flags, stream, id, payload[begin:cut]))
		begin, kind = cut, frameUnset
	}
	return frames
}

// A NOTIFY may be cut anywhere, and its values come out whole.
func TestFragments(t *testing.T) {
	got := make(chan string, 10)
	_, ln := startMem(t, WithFragmentation(1000), WithFallback(HandlerFunc(func(ctx context.Context, m *Message, a *Actions) error {
		s := m.Name()
		for name, v := range m.Args() {
			s += fmt.Sprintf(" %s=%v:%q", name, v.Kind(), v.String())
		}
		got <- s
		return numbered(ctx, m, a)
	})))
	payload := string(appendMessage(appendMessage(nil, NewMessage("one", Arg{"n", Uint64(math.MaxUint64)}, Arg{"long", String(strings.Repeat("s", 250))})),
		NewMessage("two", Arg{"", Bool(true)}, Arg{"b", Binary([]byte("\x00\xff"))}, Arg{"null", Value{}})))
	want := []string{fmt.Sprintf("one n=uint64:\"18446744073709551615\" long=string:%q", strings.Repeat("s", 250)),
		`two =bool:"true" b=binary:"\x00\xff" null=null:"<null>"`}
	h := ln.dial(t)
	if agreed := h.hello(); !agreed.can("fragmentation") {
		t.Fatalf("want fragmentation announced, have %+v", agreed)
	}
	check := func(frames []string) {
		t.Helper()
		h.send(frames...)
		f := h.want(frameAck)
		if f.stream != 1<<40 || f.id != 7 || f.flags != flagFIN || f.abort() {
			t.Fatalf("want an ACK of the ids, have %s", inWordsFrame(f))
		}
		for _, want := range want {
			if have := receive(t, "a call", got); want != have {
				t.Fatalf("want %s, have %s", want, have)
			}
		}
	}
	for cut := range len(payload) {
		check(fragments(1<<40, 7, payload, cut))
		check(fragments(1<<40, 7, payload, cut/2, cut))
	}
	var all []int
	for cut := range payload {
		all = append(all, cut)
	}
	check(fragments(1<<40, 7, payload, all...))
}

func TestFragmentRules(t *testing.T) {
	const max = 300
	message := func(n int) string { // a payload of n bytes
		return string(appendMessage(nil, NewMessage("number", Arg{"", String(strings.Repeat("x", n-len("\x06number\x01\x00\x08\xf0\x00")))})))
	}
	first := func(stream, id uint64) string { return rawFrame(frameNotify, 0, stream, id, number[:3]) }
	last := func(stream, id uint64) string { return rawFrame(frameUnset, flagFIN, stream, id, number[3:]) }
	type step struct {
		send       string
		stream, id uint64 // of the ACK; 0, 0: none
		refused    bool   // the ACK says ABORT
	}
	for _, tt := range []struct {
		name         string
		off          bool
		capabilities string
		steps        []step
		end          Status // 0: it goes on
	}{
		{name: "not announced", off: true, steps: []step{{send: first(1, 1)}}, end: StatusNoFragmentation},
		{name: "not announced, UNSET", off: true, steps: []step{{send: last(1, 1)}}, end: StatusNoFragmentation},
		{name: "one frame and another", steps: []step{
			{first(1, 1) + last(1, 1), 1, 1, false}, {first(2, 1) + last(2, 1), 2, 1, false}}},
		{name: "abort at once", steps: []step{
			{send: rawFrame(frameNotify, flagAbort, 1, 1, number)}, {send: rawFrame(frameNotify, flagAbort|flagFIN, 1, 1, number)}}},
		{name: "abort later", steps: []step{
			{send: first(1, 1) + rawFrame(frameUnset, flagAbort|flagFIN, 1, 1, "")}, {first(1, 1) + last(1, 1), 1, 1, false}}},
		{name: "abort later without FIN", steps: []step{
			{send: first(1, 1) + rawFrame(frameUnset, flagAbort, 1, 1, "xxx")}, {first(1, 1) + last(1, 1), 1, 1, false}}},
		{name: "another stream's begins", steps: []step{{send: first(1, 1) + first(2, 1)}}, end: StatusInterlaced},
		{name: "another frame's begins", steps: []step{{send: first(1, 1) + first(1, 2)}}, end: StatusInterlaced},
		{name: "the same begins", steps: []step{{send: first(1, 1) + first(1, 1)}}, end: StatusInterlaced},
		{name: "another one's end", steps: []step{{send: first(1, 1) + last(2, 1)}}, end: StatusInterlaced},
		{name: "another frame's end", steps: []step{{send: first(1, 1) + last(1, 2)}}, end: StatusInterlaced},
		{name: "a whole one in between", capabilities: "pipelining", steps: []step{
			{first(1, 1) + notifyFrame(2, 2), 2, 2, false}, {last(1, 1), 1, 1, false}}},
		{name: "a whole one in between, without pipelining", steps: []step{
			{send: first(1, 1) + notifyFrame(2, 2)}}, end: StatusInterlaced},
		{name: "no beginning", steps: []step{{send: last(1, 1)}}, end: StatusFrameIDNotFound},
		{name: "no beginning any more", steps: []step{
			{first(1, 1) + last(1, 1), 1, 1, false}, {send: last(1, 1)}}, end: StatusFrameIDNotFound},
		{name: "no beginning but aborted", steps: []step{
			{send: first(1, 1) + rawFrame(frameUnset, flagAbort|flagFIN, 1, 1, "") + last(1, 1)}}, end: StatusFrameIDNotFound},
		{name: "malformed when whole", steps: []step{
			{send: first(1, 1) + rawFrame(frameUnset, flagFIN, 1, 1, "x")}}, end: StatusInvalidFrame},
		{name: "the longest", steps: []step{{strings.Join(fragments(1, 1, message(max), 250), ""), 1, 1, false}}},
		{name: "too long", steps: []step{
			{strings.Join(fragments(1, 1, message(max+1), 250), ""), 1, 1, true}, {notifyFrame(2, 2), 2, 2, false}}},
		{name: "too long, the rest swallowed", steps: []step{
			{strings.Join(fragments(1, 1, message(max+100), 200, 301, 310, 320), ""), 1, 1, true},
			{first(2, 1) + last(2, 1), 2, 1, false}, {notifyFrame(2, 2), 2, 2, false}}},
		// HAProxy sends no more of what the agent has given up.
		{name: "too long, no rest", steps: []step{
			{rawFrame(frameNotify, 0, 1, 1, message(max+1)), 1, 1, true},
			{notifyFrame(2, 2), 2, 2, false}, {first(3, 1) + last(3, 1), 3, 1, false}}},
		{name: "too long, and again", steps: []step{
			{rawFrame(frameNotify, 0, 1, 1, message(max+1)), 1, 1, true},
			{rawFrame(frameNotify, 0, 2, 1, message(max+1)) + rawFrame(frameUnset, 0, 2, 1, "rest"), 2, 1, true},
			{first(1, 1) + last(1, 1), 1, 1, false}}},
		{name: "too long, no beginning of others", steps: []step{
			{rawFrame(frameNotify, 0, 1, 1, message(max+1)), 1, 1, true}, {send: last(2, 1)}}, end: StatusFrameIDNotFound},
		{name: "too long, no beginning of another frame", steps: []step{
			{rawFrame(frameNotify, 0, 1, 1, message(max+1)), 1, 1, true}, {send: last(1, 2)}}, end: StatusFrameIDNotFound},
		{name: "too long, aborted, no beginning", steps: []step{
			{rawFrame(frameNotify, 0, 1, 1, message(max+1)) + rawFrame(frameUnset, flagAbort, 1, 1, ""), 1, 1, true}, {send: last(1, 1)}}, end: StatusFrameIDNotFound},
		{name: "too long, ended, no beginning", steps: []step{
			{rawFrame(frameNotify, 0, 1, 1, message(max+1)) + last(1, 1), 1, 1, true}, {send: last(1, 1)}}, end: StatusFrameIDNotFound},
	} {
		t.Run(tt.name, func(t *testing.T) {
			opts := []Option{withNumbered(), WithFragmentation(max)}
			if tt.off {
				opts = opts[:1]
			}
			_, ln := startMem(t, opts...)
			h := ln.dial(t)
			offer := offered
			offer.capabilities = tt.capabilities
			h.helloAs(offer)
			for _, s := range tt.steps {
				h.send(s.send)
				switch {
				case s.refused:
					want := inWordsFrame(frame{kind: frameAck, flags: flagFIN | flagAbort, stream: s.stream, id: s.id})
					if have := inWordsFrame(h.want(frameAck)); want != have {
						t.Fatalf("want %s, have %s", want, have)
					}
				case s.stream > 0:
					h.wantAck(s.stream, s.id)
				}
			}
			if tt.end != 0 {
				h.wantEnd(tt.end)
				return
			}
			h.wantAnswers()
		})
	}
}

func TestAssembler(t *testing.T) {
	notify := func(flags uint32, id uint64, payload string) frame {
		return frame{kind: frameNotify, flags: flags, stream: id, id: 1, payload: []byte(payload)}
	}
	unset := func(flags uint32, id uint64, payload string) frame {
		f := notify(flags, id, payload)
		f.kind = frameUnset
		return f
	}
	type step struct {
		frame  frame
		result assembly
		whole  string
		status Status // of the error; 0: none
	}
	for name, steps := range map[string][]step{
		"two frames":        {{notify(0, 1, "ab"), unfinished, "", 0}, {unset(flagFIN, 1, "cd"), complete, "abcd", 0}},
		"three frames":      {{notify(0, 1, "a"), unfinished, "", 0}, {unset(0, 1, "b"), unfinished, "", 0}, {unset(flagFIN, 1, "c"), complete, "abc", 0}},
		"one after other":   {{notify(0, 1, "ab"), unfinished, "", 0}, {unset(flagFIN, 1, ""), complete, "ab", 0}, {notify(0, 1, "c"), unfinished, "", 0}, {unset(flagFIN, 1, "d"), complete, "cd", 0}},
		"aborted":           {{notify(0, 1, "ab"), unfinished, "", 0}, {unset(flagAbort, 1, "cd"), unfinished, "", 0}, {unset(flagFIN, 1, ""), 0, "", StatusFrameIDNotFound}},
		"as long as may be": {{notify(0, 1, "abcd"), unfinished, "", 0}, {unset(flagFIN, 1, "efgh"), complete, "abcdefgh", 0}},
		"too long": {{notify(0, 1, "abcd"), unfinished, "", 0}, {unset(0, 1, "efghi"), tooLong, "", 0},
			{unset(0, 1, "rest"), unfinished, "", 0}, {unset(flagFIN, 1, ""), unfinished, "", 0}, {unset(flagFIN, 1, ""), 0, "", StatusFrameIDNotFound}},
		"too long at its end": {{notify(0, 1, "abcd"), unfinished, "", 0}, {unset(flagFIN, 1, "efghi"), tooLong, "", 0}, {unset(flagFIN, 1, ""), 0, "", StatusFrameIDNotFound}},
		"too long at once":    {{notify(0, 1, "abcdefghi"), tooLong, "", 0}, {notify(0, 2, "a"), unfinished, "", 0}, {unset(flagFIN, 2, "b"), complete, "ab", 0}},
		"another begun":       {{notify(0, 1, "ab"), unfinished, "", 0}, {notify(0, 2, "cd"), 0, "", StatusInterlaced}},
		"other ids":           {{notify(0, 1, "ab"), unfinished, "", 0}, {unset(flagFIN, 2, "cd"), 0, "", StatusInterlaced}},
		"no beginning":        {{unset(flagFIN, 1, "ab"), 0, "", StatusFrameIDNotFound}},
	} {
		t.Run(name, func(t *testing.T) {
			g := assembler{max: 8}
			for i, s := range steps {
				payload, result, err := g.add(&s.frame)
				status := StatusNormal
				if d, ok := err.(*DisconnectError); ok {
					status = d.Status
				}
				if string(payload) != s.whole || result != s.result || status != s.status {
					t.Errorf("frame %d: want %q, %d, status %v; have %q, %d, %v", i, s.whole, s.result, s.status, payload, result, err)
				}
			}
		})
	}
	var none assembler
	f := notify(0, 1, "ab")
	if _, _, err := none.add(&f); err == nil || err.(*DisconnectError).Status != StatusNoFragmentation {
		t.Errorf("without fragmentation: want %v, have %v", StatusNoFragmentation, err)
	}
}

// What a fragmented NOTIFY took is given back at once, though the connection is
// never idle.
func TestFragmentsGiveBackMemory(t *testing.T) {
	const conns, size = 20, 1 << 20
	offer := hello{versions: "2.0", frameSize: 65535, capabilities: "pipelining,fragmentation"}
	payload := string(appendMessage(nil, NewMessage("big", Arg{"s", String(strings.Repeat("x", size))})))
	for _, last := range []uint32{flagFIN, flagAbort} {
		synctest.Test(t, func(t *testing.T) {
			_, ln := startMem(t, withNumbered(), WithFragmentation(2*size),
				WithHandlerFunc("big", func(context.Context, *Message, *Actions) error { return nil }))
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			for range conns {
				h := ln.dial(t)
				h.helloAs(offer)
				kind, flags := byte(frameNotify), uint32(0)
				for rest := payload; rest != ""; kind = frameUnset {
					n := min(len(rest), 60000)
					if n == len(rest) {
						flags = last
					}
					h.send(rawFrame(kind, flags, 1, 1, rest[:n]))
					rest = rest[n:]
				}
				if last == flagFIN {
					h.want(frameAck)
				}
				h.wantAnswers()
			}
			runtime.GC()
			runtime.ReadMemStats(&after)
			if kept := (int64(after.HeapAlloc) - int64(before.HeapAlloc)) / conns; kept > size/2 {
				t.Errorf("flags %d: want less than %d bytes kept by each connection, have %d", last, size/2, kept)
			}
		})
	}
}
