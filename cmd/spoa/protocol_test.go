//go:build unix

package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/spoa-go/spoa"
)

// older tells whether the HAProxy has one applet for a connection, which knows fragmentation and async: up to 3.0.
func (b haproxyBin) older() bool {
	var major, minor int
	fmt.Sscanf(b.version, "%d.%d", &major, &minor)
	return major < 3 || major == 3 && minor == 0
}

// faultText sets txn.*.fault to the name of a fault.
func faultText() spoa.Option {
	return spoa.WithFaultFunc(spoa.ScopeTxn, "fault", func(f spoa.Fault, _ error) spoa.Value { return spoa.String(f.String()) })
}

// Failing closed: the handler sets its verdict when it succeeds and never when it doesn't, in the scope txn, since one of
// the scope sess would be found again by the next request of the connection; HAProxy denies what has no verdict.
func TestE2EFailClosed(t *testing.T) {
	failClosed(t, "unless { var(txn.iprep.ip_score) -m found }")
}

// The other habit: HAProxy denies what has an error, of its own option set-on-error or of the agent's WithFaultVar.
func TestE2EFailClosedByError(t *testing.T) {
	failClosed(t, "if { var(txn.iprep.error) -m int gt 0 }")
}

func failClosed(t *testing.T, condition string) {
	forEachHAProxy(t, func(t *testing.T, bin haproxyBin) {
		release := make(chan struct{})
		addr := serveHere(t, spoa.WithHandlerTimeout(50*time.Millisecond), spoa.WithWorkers(1), faultText(),
			spoa.WithFaultVar(spoa.ScopeTxn, "error", spoa.Int(255)),
			spoa.WithHandlerFunc("check-client-ip", func(_ context.Context, m *spoa.Message, a *spoa.Actions) error {
				a.SetVar(spoa.ScopeTxn, "ip_score", spoa.Uint32(100))
				switch v, _ := m.Lookup("do"); v.String() {
				case "panic":
					panic("as the client wants")
				case "fail":
					return errors.New("as the client wants")
				case "block":
					<-release // and whoever comes meanwhile finds no worker
				}
				return nil
			}))
		t.Cleanup(func() { close(release) }) // before the agent is closed
		h := startHAProxy(t, bin, setup{
			agent: addr,
			cfg: []string{
				"    http-request deny status 403 if { var(sess.iprep.ip_score) -m int lt 20 }",
				"    http-request deny status 403 " + condition + "\n" +
					"    http-after-response set-header X-Fault %[var(txn.iprep.fault)] if { var(txn.iprep.fault) -m found }",
			},
			spoe: []string{"args src", "args src do=req.hdr(x-do)", "event on-client-session\n", "event on-frontend-http-request\n"},
		})
		client := &http.Client{Transport: new(http.Transport), Timeout: 2 * patience} // one connection for all
		defer client.CloseIdleConnections()
		for _, test := range []struct {
			do, fault string
			status    int
		}{
			{"", "", http.StatusOK},
			{"fail", "error", http.StatusForbidden},
			{"", "", http.StatusOK},
			{"panic", "panic", http.StatusForbidden},
			{"", "", http.StatusOK},
			{"block", "timeout", http.StatusForbidden},
			{"", "overload", http.StatusForbidden},
		} {
			req, err := http.NewRequest("GET", h.url, nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("X-Do", test.do)
			resp, err := do(client, req)
			if err != nil {
				t.Fatal(err)
			}
			if have := resp.Header.Get("X-Fault"); resp.StatusCode != test.status || have != test.fault {
				t.Errorf("%q: want status %d, fault %q; have %d, %q", test.do, test.status, test.fault, resp.StatusCode, have)
			}
		}
		// All of them were answered.
		if n := h.spoeLog.counts(); len(n) > 0 {
			t.Errorf("SPOE log has errors, by status: %v", n)
		}
	})
}

// Nor does anything pass when there is no agent.
func TestE2EFailClosedNoAgent(t *testing.T) {
	forEachHAProxy(t, func(t *testing.T, bin haproxyBin) {
		h := startHAProxy(t, bin, setup{
			agent:   freeAddr(t, "127.0.0.1"),
			mayLose: true,
			cfg: []string{
				"    http-request deny status 403 if { var(sess.iprep.ip_score) -m int lt 20 }",
				"    http-request deny status 403 unless { var(sess.iprep.ip_score) -m found }",
			},
			spoe: []string{"processing 10s", "processing 300ms"},
		})
		resp, err := get(newClient(), h.url)
		if err != nil {
			t.Fatal(err)
		}
		if resp.StatusCode != http.StatusForbidden || resp.Header.Get("X-IP-Error") == "" {
			t.Errorf("want status 403 and an error; have %d, %v", resp.StatusCode, resp.Header)
		}
	})
}

// do is client.Do with the body read.
func do(client *http.Client, req *http.Request) (*http.Response, error) {
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return resp, err
}

// Bodies larger than a frame arrive in fragments and whole, those beyond the agent's limit are refused, and neither
// concerns the next ones. From 3.1 on HAProxy has no fragments: what is too large for a frame is an error of its own.
func TestE2EFragmentation(t *testing.T) {
	forEachHAProxy(t, func(t *testing.T, bin haproxyBin) {
		const frameSize, limit, clients, requests = 1000, 8000, 8, 40
		var inFragments sync.Map
		addr := serveHere(t, spoa.WithFragmentation(limit), faultText(),
			spoa.WithHandlerFunc("check-client-ip", func(_ context.Context, m *spoa.Message, a *spoa.Actions) error {
				body, ok := m.Lookup("body")
				if !ok {
					return errors.New("no body")
				}
				if len(body.Bytes()) > frameSize {
					inFragments.Store(m.StreamID(), true)
				}
				sum := sha256.Sum256(body.Bytes())
				a.SetVar(spoa.ScopeTxn, "sum", spoa.String(hex.EncodeToString(sum[:])))
				return nil
			}))
		h := startHAProxy(t, bin, setup{
			agent: addr,
			cfg: []string{
				"    default-path config", "    default-path config\n    nbthread 2",
				"    filter spoe", "    option http-buffer-request\n    filter spoe",
				"    # For the reader:", "    http-after-response set-header X-Sum %[var(txn.iprep.sum)]\n" +
					"    http-after-response set-header X-Fault %[var(txn.iprep.fault)]\n    # For the reader:",
			},
			spoe: []string{
				"    option var-prefix", fmt.Sprintf("    max-frame-size %d\n    option var-prefix", frameSize),
				"args src", "args src body=req.body",
				"event on-client-session\n", "event on-frontend-http-request\n",
			},
		})
		var all sync.WaitGroup
		for range clients {
			all.Go(func() {
				client := newClient()
				for range requests {
					body := make([]byte, mathrand.N(14000)) // with the request's head, less than a buffer
					rand.Read(body)
					req, err := http.NewRequest("POST", h.url, bytes.NewReader(body))
					if err != nil {
						t.Error(err)
						return
					}
					resp, err := do(client, req)
					if err != nil {
						t.Error(err)
						return
					}
					// The name of the message and of the arguments, and the address, take less than 100 bytes.
					most := frameSize
					if bin.older() {
						most = limit
					}
					sum := sha256.Sum256(body)
					// An ACK that carries ABORT is no error to HAProxy.
					want, have, fault := hex.EncodeToString(sum[:]), resp.Header.Get("X-Sum"), resp.Header.Get("X-Fault")+resp.Header.Get("X-IP-Error")
					switch {
					case len(body) > most:
						want = ""
					case len(body) > most-100 && have == "":
						want = "" // one or the other
					}
					if have != want || (fault == "") != (want != "") {
						t.Errorf("body of %d bytes: want sum %q, have %q, error %q", len(body), want, have, fault)
					}
				}
			})
		}
		all.Wait()
		n := 0
		inFragments.Range(func(any, any) bool { n++; return true })
		if (n > clients) != bin.older() {
			t.Errorf("%d of %d bodies came in fragments", n, clients*requests)
		}
		t.Logf("%d in fragments; SPOE log, by status: %v", n, h.spoeLog.counts())
	})
}

// A relay stands between HAProxy and an agent, cuts connections, and judges the ACKs that pass. It counts under mu.
type relay struct {
	addr  string
	agent string
	after func() int // how many frames until a connection is cut; nil: never by itself

	forget bool // all that is counted below

	mu       sync.Mutex
	links    map[*link]bool
	asked    map[notifyID]*link // the NOTIFYs seen, by whom
	answered map[notifyID]int
	stray    int // ACKs that nobody has asked for, or of another engine
	sibling  int // ACKs that came by another connection of the same engine
	cuts     int
}

type notifyID struct {
	engine        string
	stream, frame uint64
}

// A link is a connection through the relay.
type link struct {
	haproxy, agent *net.TCPConn
	offered        string // the engine of its HELLO
	engine         string // the same if async is agreed on, else a name of its own: the ids are the connection's too
	inFlight       int
	left           int // frames until it is cut
}

func startRelay(t *testing.T, agent string, after func() int) *relay {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{addr: l.Addr().String(), agent: agent, after: after, links: map[*link]bool{}, asked: map[notifyID]*link{}, answered: map[notifyID]int{}}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			front, err := l.Accept()
			if err != nil {
				return
			}
			back, err := net.Dial("tcp", agent)
			if err != nil {
				front.Close()
				continue
			}
			k := &link{haproxy: front.(*net.TCPConn), agent: back.(*net.TCPConn)}
			k.engine = front.RemoteAddr().String()
			if after != nil {
				k.left = after()
			}
			r.mu.Lock()
			r.links[k] = true
			r.mu.Unlock()
			all.Go(func() { r.pass(k, k.agent, k.haproxy) })
			all.Go(func() { r.pass(k, k.haproxy, k.agent) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		r.mu.Lock()
		for k := range r.links {
			k.haproxy.Close()
			k.agent.Close()
		}
		r.mu.Unlock()
		all.Wait()
	})
	return r
}

// Types of frames (SPOE.txt 3.2).
const typeNotify, typeAck = 3, 103

// readFrame reads a frame with its length; b[4] is its type.
func readFrame(from io.Reader) (b []byte, err error) {
	b = make([]byte, 4)
	if _, err = io.ReadFull(from, b); err == nil {
		b = append(b, make([]byte, binary.BigEndian.Uint32(b))...)
		_, err = io.ReadFull(from, b[4:])
	}
	return b, err
}

// pass moves whole frames until either side ends.
func (r *relay) pass(k *link, to, from *net.TCPConn) {
	for {
		b, err := readFrame(from)
		if err != nil {
			break
		}
		cut := r.judge(k, b[4:])
		if _, err := to.Write(b); err != nil || cut {
			break
		}
	}
	r.mu.Lock()
	delete(r.links, k)
	r.mu.Unlock()
	k.haproxy.Close()
	k.agent.Close()
}

// judge looks at a frame and tells whether its connection is to be cut after it.
func (r *relay) judge(k *link, frame []byte) (cut bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	const hello, notify, agentHello, ack = 1, typeNotify, 101, typeAck
	stream, rest := varint(frame[5:])
	id, rest := varint(rest)
	key := notifyID{k.engine, stream, id}
	switch kind := frame[0]; {
	case r.forget:
	case kind == hello:
		if _, name, ok := bytes.Cut(rest, []byte("engine-id\x08")); ok {
			k.offered = string(name[1 : 1+name[0]])
		}
	case kind == agentHello:
		if bytes.Contains(rest, []byte("async")) {
			k.engine = k.offered
		}
	case kind == notify:
		k.inFlight++
		r.asked[key] = k
	case kind == ack:
		from := r.asked[key]
		if from == nil {
			r.stray++
			break
		}
		from.inFlight--
		r.answered[key]++
		if from != k {
			r.sibling++
		}
	}
	k.left--
	if k.left == 0 {
		r.cuts++
		if r.cuts%2 == 0 {
			k.agent.SetLinger(0) // with a reset instead of an end
		}
	}
	return k.left == 0
}

// varint reads a number as SPOP writes it.
func varint(b []byte) (v uint64, rest []byte) {
	v, rest = uint64(b[0]), b[1:]
	if v < 240 {
		return v, rest
	}
	for shift := 4; ; shift += 7 {
		c := rest[0]
		rest = rest[1:]
		v += uint64(c) << shift
		if c < 128 {
			return v, rest
		}
	}
}

// check expects no ACK twice, and none that nobody has asked for.
func (r *relay) check(t *testing.T) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	twice := 0
	for _, n := range r.answered {
		if n > 1 {
			twice++
		}
	}
	if twice > 0 || r.stray > 0 {
		t.Errorf("of %d NOTIFYs, %d were answered twice; %d answers to none", len(r.asked), twice, r.stray)
	}
	t.Logf("%d NOTIFYs, %d answered, %d of them by siblings; %d cuts", len(r.asked), len(r.answered), r.sibling, r.cuts)
}

// asyncSetup has HAProxy use several connections for each thread.
func asyncSetup(agent string) setup {
	return setup{
		agent: agent,
		cfg:   []string{"    default-path config", "    default-path config\n    nbthread 2"},
		spoe: []string{
			"    option var-prefix", "    option async\n    max-waiting-frames 2\n    option var-prefix",
			"processing 10s", "processing 2s", // how long one that is lost waits
		},
	}
}

// Under load, with connections cut at random, no NOTIFY is answered twice or on a connection of another engine.
func TestE2ECuts(t *testing.T) {
	forEachHAProxy(t, func(t *testing.T, bin haproxyBin) {
		addr := serveHere(t, spoa.WithAsync(), spoa.WithRotation(300),
			spoa.WithHandlerFunc("check-client-ip", func(_ context.Context, _ *spoa.Message, a *spoa.Actions) error {
				time.Sleep(mathrand.N(4 * time.Millisecond)) // so that some are in flight at a cut
				a.SetVar(spoa.ScopeSess, "ip_score", spoa.Uint32(100))
				return nil
			}))
		r := startRelay(t, addr, func() int { return 20 + mathrand.N(400) })
		h := startHAProxy(t, bin, asyncSetup(r.addr))
		l := startLoad(t, h.url, 20)
		l.more(t, 2000)
		got := l.stop()
		got.checkAnswered(t)
		r.check(t)
		if r.cuts == 0 {
			t.Error("no connection was cut")
		}
		if bin.older() && r.sibling == 0 {
			t.Error("no answer came by a sibling")
		}
		t.Logf("%d of %d without a score; SPOE log, by status: %v", got.missing, got.requests, h.spoeLog.counts())
	})
}

// The answers to what is in flight on a connection that is cut come by another one of the same engine, and HAProxy takes
// them.
func TestE2EAsyncSiblings(t *testing.T) {
	forEachHAProxy(t, func(t *testing.T, bin haproxyBin) {
		if !bin.older() {
			t.Skip("no async")
		}
		for _, how := range []string{"end", "reset"} {
			t.Run(how, func(t *testing.T) {
				const clients = 12
				release := make(chan struct{})
				closed := make(chan spoa.Peer, 100)
				addr := serveHere(t, spoa.WithAsync(),
					spoa.WithHooks(spoa.Hooks{ConnClosed: func(p spoa.Peer, _ error) { closed <- p }}),
					spoa.WithHandlerFunc("check-client-ip", func(_ context.Context, _ *spoa.Message, a *spoa.Actions) error {
						<-release
						a.SetVar(spoa.ScopeSess, "ip_score", spoa.Uint32(100))
						return nil
					}))
				var once sync.Once
				open := func() { once.Do(func() { close(release) }) }
				t.Cleanup(open)
				r := startRelay(t, addr, nil)
				h := startHAProxy(t, bin, asyncSetup(r.addr))
				l := startLoad(t, h.url, clients)
				// All wait; each thread has more than one connection.
				eventually(t, "NOTIFYs of all clients", func() bool {
					r.mu.Lock()
					defer r.mu.Unlock()
					return len(r.asked) == clients
				})
				cut := r.cutBusy(how == "reset")
				if cut == 0 {
					t.Fatal("no connection has something in flight and a sibling")
				}
				for p := range closed {
					if p.EngineID != "" {
						break
					}
				}
				l.halt()
				open()
				got := l.stop()
				got.check(t)
				r.check(t)
				if r.sibling != cut {
					t.Errorf("%d were in flight on a connection that was cut, %d answers came by siblings", cut, r.sibling)
				}
				if n := h.spoeLog.counts(); len(n) > 0 {
					t.Errorf("SPOE log has errors, by status: %v", n)
				}
			})
		}
	})
}

// cutBusy cuts one connection with a sibling and returns how many NOTIFYs are in flight on it.
func (r *relay) cutBusy(reset bool) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	first := map[string]*link{}
	for k := range r.links {
		if k.inFlight == 0 {
			continue
		}
		if first[k.engine] == nil {
			first[k.engine] = k
			continue
		}
		if reset {
			k.agent.SetLinger(0)
		}
		k.agent.Close()
		k.haproxy.Close()
		return k.inFlight
	}
	return 0
}
