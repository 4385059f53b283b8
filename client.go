package spoa

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	clientWindow    = 1024             // NOTIFYs in flight if the agent announces pipelining
	farewellTimeout = 2 * time.Second  // for the agent to take or answer a DISCONNECT
	checkFrameSize  = 16380            // what option spop-check announces
	maxSpareBuffer  = 16 * lengthLimit // kept for the next write
	lengthLimit     = lengthSize + defaultFrameSize
)

var errBusy = errors.New("spoa: too many NOTIFYs in flight")

// Client is HAProxy's side of one connection to an agent: for tests, probes and
// load. It insists on what the specification says even where HAProxy is
// lenient. Its methods may be called by several goroutines at once.
//
// A connection ends with Close, when the agent sends an AGENT-DISCONNECT or closes
// it, or at the agent's first fault, of which the Client tells it by a
// HAPROXY-DISCONNECT. Every Notify, waiting or to come, then fails with the same
// error, which is or wraps a *DisconnectError: with Remote and the agent's
// status if the agent said why; with StatusIO, around the error of the
// net.Conn, if the connection broke; with StatusNormal after Close; otherwise
// with the status of the agent's fault.
type Client struct {
	conn  net.Conn // closed by read
	agent hello

	r       *bufio.Reader // this and actions are read's
	actions []Action      // of the ACK being handled

	slots   chan struct{} // holds one for each NOTIFY in flight
	waiters sync.Pool     // of *waiter; not shared by Clients, which may be in different synctest bubbles
	writers sync.WaitGroup
	done    chan struct{} // closed when the connection is, and no goroutine left
	bye     error         // what Close returns, set before done is closed

	mu      sync.Mutex
	pending map[uint64]func([]Action, error) // what to call with the answer, by STREAM-ID
	stream  uint64                           // the next STREAM-ID
	out     []byte                           // frames to write
	spare   []byte                           // the next out
	writing bool                             // write runs, or has failed for good
	werr    error                            // why it failed
	err     error                            // why the connection has ended
}

// waiter is a Notify that waits for its ACK.
type waiter struct {
	actions  []Action
	err      error
	answered chan struct{}         // has room for one, so that read never waits
	done     func([]Action, error) // answer, bound
}

func newWaiter() *waiter {
	w := &waiter{answered: make(chan struct{}, 1)}
	w.done = w.answer
	return w
}

func (w *waiter) answer(actions []Action, err error) {
	w.actions, w.err = slices.Clone(actions), err
	for i := range w.actions {
		w.actions[i].Value = w.actions[i].Value.Clone()
	}
	w.answered <- struct{}{}
}

// Dial connects to an agent, on any network that net.Dial knows, and does the
// HELLO. The context bounds both, and nothing after them. To an agent that speaks
// TLS connect with a tls.Dialer, and give the connection to NewClient.
func Dial(ctx context.Context, network, address string) (*Client, error) {
	conn, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return NewClient(ctx, conn)
}

// NewClient does the HELLO on a connection (SPOE.txt 3.2.3): it offers version
// 2.0, frames of up to 65535 bytes, pipelining and an engine-id of its own. The
// connection, of which it uses Read, Write, Close and the deadlines, is the
// Client's from then on: NewClient closes it if the HELLO fails, with an error
// as the Client would give it, or that of the context.
func NewClient(ctx context.Context, conn net.Conn) (*Client, error) {
	c := &Client{
		conn:    conn,
		r:       bufio.NewReaderSize(conn, lengthLimit),
		done:    make(chan struct{}),
		pending: make(map[uint64]func([]Action, error)),
		stream:  1,
	}
	c.waiters.New = func() any { return newWaiter() }
	ours := hello{versions: version, frameSize: defaultFrameSize, capabilities: "pipelining", engineID: newEngineID()}
	var err error
	if c.agent, err = greet(ctx, conn, c.r, &ours); err != nil {
		return nil, err
	}
	window := 1
	if c.agent.can("pipelining") {
		window = clientWindow
	}
	c.slots = make(chan struct{}, window)
	go c.read()
	return c, nil
}

// AgentHello is what an agent agrees to in its AGENT-HELLO (SPOE.txt 3.2.5).
type AgentHello struct {
	Version      string
	MaxFrameSize int      // in bytes, for both directions, without the 4 of the length
	Capabilities []string // as announced; nil if there are none
}

// Hello returns what the agent agreed to.
func (c *Client) Hello() AgentHello { return c.agent.exported() }

func (h *hello) exported() AgentHello {
	a := AgentHello{Version: h.versions, MaxFrameSize: int(h.frameSize)}
	for name := range strings.SplitSeq(h.capabilities, ",") {
		if name = strings.TrimSpace(name); name != "" {
			a.Capabilities = append(a.Capabilities, name)
		}
	}
	return a
}

// Check does what HAProxy's `option spop-check` does: it connects to an agent, on
// any network that net.Dial knows, and returns the error of Probe.
func Check(ctx context.Context, network, address string) error {
	conn, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return err
	}
	_, err = Probe(ctx, conn)
	return err
}

// Probe sends a HELLO with healthcheck set (SPOE.txt 3.2.4) and returns what the
// agent agrees to, or an error as NewClient does. It closes the connection, as the
// agent may.
func Probe(ctx context.Context, conn net.Conn) (AgentHello, error) {
	ours := hello{versions: version, frameSize: checkFrameSize, healthcheck: true}
	agent, err := greet(ctx, conn, bufio.NewReaderSize(conn, lengthSize+checkFrameSize), &ours)
	if err != nil {
		return AgentHello{}, err
	}
	_ = conn.Close() // the answer is there, and the agent may have been first
	return agent.exported(), nil
}

// Ack is the actions of an ACK, in their order.
type Ack []Action

// Lookup returns what a variable is set to by the last action on it.
func (a Ack) Lookup(s Scope, name string) (v Value, ok bool) {
	for _, act := range a {
		if act.Scope == s && act.Name == name {
			v, ok = act.Value, !act.Unset
		}
	}
	return v, ok
}

// Notify sends the messages in one NOTIFY (SPOE.txt 3.2.6) and returns the
// actions of its ACK in their order, nil if there are none. The actions are the
// caller's to keep. Messages may be used by several calls at once.
//
// Up to 1024 NOTIFYs are in flight on a connection, one if the agent does not
// announce pipelining; further calls wait for their turn. When the context is
// done Notify returns its error, and the connection goes on: the ACK, should it
// come, is ignored, but until then the NOTIFY counts as one in flight.
//
// Two errors concern this call alone: that of a NOTIFY that exceeds the
// negotiated frame size, which is not sent, and that of an ACK with which the
// agent aborts it. Any other says why the connection has ended.
func (c *Client) Notify(ctx context.Context, msgs ...*Message) (Ack, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	select {
	case c.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	w := c.waiters.Get().(*waiter)
	stream, err := c.send(w.done, msgs)
	if err != nil {
		return nil, err
	}
	select {
	case <-w.answered:
	case <-ctx.Done():
		if c.abandon(stream) {
			return nil, ctx.Err()
		}
		<-w.answered
	}
	actions, err := w.actions, w.err
	c.waiters.Put(w)
	return actions, err
}

// Start is Notify without a goroutine for each NOTIFY in flight, for load
// generators. It returns at once: with an error if the
// NOTIFY has not been sent, because it is too big, 1024 are in flight (one
// without pipelining) or the connection has ended; otherwise done is called
// once, with what Notify would return. The actions and their Values are gone
// when done returns. It runs in the goroutine that reads the connection, or that
// of Close: it may call Start, but must neither wait nor call Close.
func (c *Client) Start(done func([]Action, error), msgs ...*Message) error {
	select {
	case c.slots <- struct{}{}:
		_, err := c.send(done, msgs)
		return err
	default:
		return errBusy
	}
}

// send takes a slot's NOTIFY to write, or gives the slot back.
func (c *Client) send(done func([]Action, error), msgs []*Message) (stream uint64, err error) {
	defer func() {
		if stream == 0 {
			<-c.slots
		}
	}()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return 0, c.err
	}
	start := len(c.out)
	b := beginFrame(c.out, frameNotify, flagFIN, c.stream, 1)
	for _, m := range msgs {
		b = appendMessage(b, m)
	}
	if size := len(b) - start - lengthSize; size > int(c.agent.frameSize) {
		return 0, fmt.Errorf("spoa: NOTIFY of %d bytes: the negotiated frame size is %d", size, c.agent.frameSize)
	}
	stream = c.stream
	c.stream += 2 // odd, as HAProxy counts them from 3.1 on
	c.pending[stream] = done
	c.push(finishFrame(b, start))
	return stream, nil
}

// push makes b, which is c.out and more, the bytes to write. The caller holds
// mu.
func (c *Client) push(b []byte) {
	c.out = b
	if !c.writing {
		c.writing = true
		c.writers.Add(1)
		go c.write()
	}
}

// write writes until nothing is left. There is one at a time, in a goroutine of
// its own: a Notify must be able to give up, and read must go on reading while
// the agent does not.
func (c *Client) write() {
	defer c.writers.Done()
	runtime.Gosched() // the ACKs that woke one Notify have woken others: let them add their NOTIFYs
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.out) > 0 {
		b := c.out
		c.out, c.spare = c.spare[:0], nil
		c.mu.Unlock()
		_, err := c.conn.Write(b)
		c.mu.Lock()
		if err != nil {
			// A frame may be cut, so nothing may follow. What the agent has
			// said before it stopped listening explains more: leave it to read.
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				c.werr = ioError(err)
				_ = c.conn.SetReadDeadline(time.Now().Add(farewellTimeout))
			}
			return
		}
		if cap(b) <= maxSpareBuffer {
			c.spare = b
		}
	}
	c.writing = false
}

// abandon gives up waiting for an ACK. It fails if the answer is there, or is
// about to be.
func (c *Client) abandon(stream uint64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, ok := c.pending[stream]
	if ok {
		c.pending[stream] = ignore
	}
	return ok
}

func ignore([]Action, error) {}

// Close sends a HAPROXY-DISCONNECT (SPOE.txt 3.2.8), waits for the agent's answer
// for up to two seconds, and closes the connection. It returns nil if the agent
// answers with AGENT-DISCONNECT and StatusNormal, or if the connection had ended
// before, and what the agent did instead otherwise. Notifys that wait fail at once.
func (c *Client) Close() error {
	c.stop(fault(StatusNormal, "the client was closed"))
	<-c.done
	return c.bye
}

// stop makes err the answer to every NOTIFY, and sends the agent a DISCONNECT if
// that does not know the reason. It reports whether it was the first.
func (c *Client) stop(err error) bool {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return false
	}
	c.err = err
	pending := c.pending
	c.pending = nil
	if d, ok := unsaid(err); ok {
		_ = c.conn.SetDeadline(time.Now().Add(farewellTimeout))
		c.push(appendDisconnect(c.out, frameHAProxyDisconnect, d.Status, d.Message))
	}
	c.mu.Unlock()
	for _, done := range pending {
		<-c.slots
		done(nil, err)
	}
	return true
}

// unsaid returns the DisconnectError in err if the agent has yet to be sent it.
func unsaid(err error) (*DisconnectError, bool) {
	var d *DisconnectError
	ok := errors.As(err, &d)
	return d, ok && !d.Remote && d.Status != StatusIO
}

// read handles the agent's frames until the connection ends, and ends it.
func (c *Client) read() {
	var f frame
	var err error
	for err == nil {
		if err = readFrame(c.r, &f, c.agent.frameSize); err == nil {
			err = c.handle(&f)
		}
	}
	if errors.Is(err, os.ErrDeadlineExceeded) { // only write and stop set one
		c.mu.Lock()
		if err = c.werr; err == nil {
			err = fault(StatusTimeout, "no answer to HAPROXY-DISCONNECT")
		}
		c.mu.Unlock()
	}
	if !c.stop(err) {
		var d *DisconnectError
		if !errors.As(err, &d) || !d.Remote || d.Status != StatusNormal {
			c.bye = err
		}
	}
	if _, ok := unsaid(err); ok {
		c.writers.Wait() // bounded by the deadline that stop has set
	}
	_ = c.conn.Close()
	c.writers.Wait()
	close(c.done)
}

// handle handles a frame of the agent. An error ends the connection.
func (c *Client) handle(f *frame) error {
	switch {
	case f.kind == frameAgentDisconnect:
		return parseDisconnect(f.payload)
	case f.kind != frameAck:
		return fault(StatusInvalidFrame, "frame of type %d in place of an ACK", f.kind)
	case !f.fin():
		return fault(StatusNoFragmentation, "ACK without FIN for stream %d", f.stream)
	case f.id != 1:
		return fault(StatusFrameIDNotFound, "ACK for stream %d, frame %d", f.stream, f.id)
	}
	c.mu.Lock()
	done, ok := c.pending[f.stream]
	delete(c.pending, f.stream)
	closing := c.err != nil
	c.mu.Unlock()
	switch {
	case closing:
		return nil
	case !ok:
		return fault(StatusFrameIDNotFound, "ACK for stream %d, which has no NOTIFY in flight", f.stream)
	}
	<-c.slots
	if f.abort() {
		done(nil, fmt.Errorf("spoa: the agent aborted the NOTIFY of stream %d", f.stream))
		return nil
	}
	actions := c.actions[:0]
	for b := f.payload; len(b) > 0; {
		a, rest, ok := cutAction(b)
		if !ok {
			err := fault(StatusInvalidFrame, "malformed action at byte %d of the ACK for stream %d", len(f.payload)-len(b), f.stream)
			done(nil, err)
			return err
		}
		actions, b = append(actions, a), rest
	}
	if c.actions = actions; len(actions) == 0 {
		actions = nil
	}
	done(actions, nil)
	return nil
}

// greet sends a HELLO and returns the agent's, or closes the connection.
func greet(ctx context.Context, conn net.Conn, r *bufio.Reader, ours *hello) (agent hello, err error) {
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	if _, err = conn.Write(appendHello(nil, frameHAProxyHello, ours)); err != nil {
		err = ioError(err)
	} else {
		agent, err = readAgentHello(r, ours.frameSize)
	}
	if !stop() {
		err = ctx.Err()
	}
	if err == nil {
		return agent, nil
	}
	if d, ok := unsaid(err); ok {
		_ = conn.SetWriteDeadline(time.Now().Add(farewellTimeout))
		_, _ = conn.Write(appendDisconnect(nil, frameHAProxyDisconnect, d.Status, d.Message))
	}
	_ = conn.Close()
	return hello{}, err
}

// readAgentHello reads the AGENT-HELLO and checks it as HAProxy does.
func readAgentHello(r *bufio.Reader, maxSize uint32) (agent hello, err error) {
	var f frame
	if err := readFrame(r, &f, maxSize); err != nil {
		return agent, err
	}
	switch {
	case f.kind == frameAgentDisconnect:
		return agent, parseDisconnect(f.payload)
	case f.kind != frameAgentHello:
		return agent, fault(StatusInvalidFrame, "frame of type %d in place of an AGENT-HELLO", f.kind)
	case !f.fin():
		return agent, fault(StatusNoFragmentation, "AGENT-HELLO without FIN")
	case f.stream != 0 || f.id != 0:
		return agent, fault(StatusInvalidFrame, "AGENT-HELLO with stream %d, frame %d", f.stream, f.id)
	}
	if err := agent.parse(frameAgentHello, f.payload); err != nil {
		return agent, err
	}
	agent.versions = strings.TrimSpace(agent.versions)
	switch {
	case agent.versions != version:
		return agent, fault(StatusBadVersion, "agent has %q", agent.versions)
	case agent.frameSize > maxSize:
		return agent, fault(StatusBadFrameSize, "agent wants %d, offered were %d", agent.frameSize, maxSize)
	}
	return agent, nil
}

// readFrame reads the next frame of up to maxSize bytes, which r must be able
// to hold. The payload is a view, gone with the next read.
func readFrame(r *bufio.Reader, f *frame, maxSize uint32) error {
	b, err := r.Peek(lengthSize)
	if err != nil {
		return cutShort(err, r)
	}
	size := binary.BigEndian.Uint32(b)
	switch {
	case size < minFrameLen, size>>24 != 0: // text, TLS
		if err := otherProtocol(b); err != nil {
			return err
		}
		return fault(StatusInvalidFrame, "%q for the length of a frame", b)
	case size > maxSize:
		return fault(StatusFrameTooBig, "frame of %d bytes, negotiated are %d", size, maxSize)
	}
	if b, err = r.Peek(lengthSize + int(size)); err != nil {
		return cutShort(err, r)
	}
	_, _ = r.Discard(len(b)) // moves no byte, so b stands
	if !f.parse(b[lengthSize:]) {
		return fault(StatusInvalidFrame, "malformed metadata of a frame of type %d", b[lengthSize])
	}
	return nil
}

func cutShort(err error, r *bufio.Reader) error {
	if err == io.EOF && r.Buffered() > 0 {
		err = io.ErrUnexpectedEOF
	}
	return ioError(err)
}

// ioError wraps the error of a net.Conn, without the addresses, which would
// make two of one kind look different.
func ioError(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		err = op.Err
	}
	return fmt.Errorf("%w: %w", &DisconnectError{Status: StatusIO}, err)
}

// newEngineID returns an engine-id in the form of HAProxy's: a random UUID.
func newEngineID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// Trace returns conn in a wrapper that calls f with each frame, sent or received,
// in readable form, such as `ACK 1:1 set-var sess.ip_score int64 42`; for looking at
// what a Client or an agent says. It calls f once at a time.
func Trace(conn net.Conn, f func(sent bool, frame string)) net.Conn {
	return &tracedConn{Conn: conn, f: f}
}

type tracedConn struct {
	net.Conn
	mu      sync.Mutex // held for f
	f       func(sent bool, frame string)
	in, out []byte // what may become a frame: the reader's, the writer's
}

func (t *tracedConn) Read(p []byte) (int, error) {
	n, err := t.Conn.Read(p)
	t.in = t.report(false, append(t.in, p[:n]...))
	return n, err
}

func (t *tracedConn) Write(p []byte) (int, error) {
	t.out = t.report(true, append(t.out, p...)) // before the answer can come
	return t.Conn.Write(p)
}

// report passes each whole frame in b to f and returns the remainder.
func (t *tracedConn) report(sent bool, b []byte) []byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	for len(b) >= lengthSize {
		size := binary.BigEndian.Uint32(b)
		if size > lengthLimit {
			t.f(sent, fmt.Sprintf("no frame: %.64q", b))
			return nil
		}
		end := lengthSize + int(size)
		if len(b) < end {
			break
		}
		t.f(sent, describe(b[:end]))
		b = b[end:]
	}
	return b
}

// ParseMessage returns a Message as NewMessage does, from text such as
//
//	check-request src=ip:192.0.2.1 method=str:GET port=int:443 str:"two words"
//
// which is a name and arguments of the form [NAME=]TYPE:VALUE with spaces between
// them. The types are null (without a value), bool (true or false), int or int64,
// int32, uint32, uint64, ip, str, bin, and hex for a bin in hexadecimal digits. A
// value may be a Go string in double quotes. The command spop has the same form.
func ParseMessage(text string) (*Message, error) {
	name, rest, _ := strings.Cut(strings.TrimSpace(text), " ")
	if name == "" {
		return nil, errors.New("spoa: ParseMessage: want a name")
	}
	var args []Arg
	for rest = strings.TrimLeft(rest, " "); rest != ""; rest = strings.TrimLeft(rest, " ") {
		if len(args) == math.MaxUint8 {
			return nil, errors.New("spoa: ParseMessage: more than 255 arguments")
		}
		a, after, err := cutArg(rest)
		if err != nil {
			return nil, fmt.Errorf("spoa: ParseMessage: argument %d: %w", len(args), err)
		}
		args, rest = append(args, a), after
	}
	return NewMessage(name, args...), nil
}

// MustParseMessage is ParseMessage for tests and constants: it panics if text is
// malformed.
func MustParseMessage(text string) *Message {
	m, err := ParseMessage(text)
	if err != nil {
		panic(err)
	}
	return m
}

var errArg = errors.New("want [NAME=]TYPE:VALUE, such as src=ip:192.0.2.1")

// cutArg takes an argument from the beginning of text.
func cutArg(text string) (a Arg, rest string, err error) {
	end := strings.IndexByte(text+" ", ' ')
	word := text[:end]
	if i := strings.IndexAny(word, "=:"); i >= 0 && word[i] == '=' {
		a.Name, text = word[:i], text[i+1:]
	}
	kind, value, ok := strings.Cut(text, ":")
	if colon := len(kind); !ok || kind == "null" || colon > end { // the colon is another argument's
		if kind, rest, _ = strings.Cut(text, " "); kind == "null" {
			return a, rest, nil
		}
		return a, "", fmt.Errorf("%q: %w", word, errArg)
	}
	if quoted, err := strconv.QuotedPrefix(value); err == nil && quoted[0] == '"' {
		rest = value[len(quoted):]
		value, _ = strconv.Unquote(quoted)
		if rest != "" && rest[0] != ' ' {
			return a, "", fmt.Errorf("%q: want a space after %s", word, quoted)
		}
	} else {
		value, rest, _ = strings.Cut(value, " ")
	}
	if a.Value, err = parseValue(kind, value); err != nil {
		return a, "", fmt.Errorf("%q: %w", word, err)
	}
	return a, rest, nil
}

func parseValue(kind, text string) (Value, error) {
	switch kind {
	case "bool":
		if text != "true" && text != "false" {
			return Value{}, errors.New("want true or false")
		}
		return Bool(text == "true"), nil
	case "int", "int64":
		i, err := parseInt(text, 64)
		return Int64(i), err
	case "int32":
		i, err := parseInt(text, 32)
		return Int32(int32(i)), err
	case "uint32":
		u, err := parseUint(text, 32)
		return Uint32(uint32(u)), err
	case "uint64":
		u, err := parseUint(text, 64)
		return Uint64(u), err
	case "ip":
		v := parseAddr(text)
		if v.kind == KindNull {
			return v, errors.New("want an address, such as 192.0.2.1 or 2001:db8::1")
		}
		return v, nil
	case "str":
		return String(text), nil
	case "bin":
		return Binary([]byte(text)), nil
	case "hex":
		b, err := hex.DecodeString(text)
		if err != nil {
			return Value{}, errors.New("want an even number of hexadecimal digits, such as 00ff")
		}
		return Binary(b), nil
	}
	return Value{}, fmt.Errorf("no type %q: want null, bool, int, int32, int64, uint32, uint64, ip, str, bin or hex", kind)
}

func parseInt(text string, bits int) (int64, error) {
	i, err := strconv.ParseInt(text, 10, bits)
	if err != nil {
		err = fmt.Errorf("want an integer from -2^%d to 2^%d-1", bits-1, bits-1)
	}
	return i, err
}

func parseUint(text string, bits int) (uint64, error) {
	u, err := strconv.ParseUint(text, 10, bits)
	if err != nil {
		err = fmt.Errorf("want an integer from 0 to 2^%d-1", bits)
	}
	return u, err
}
