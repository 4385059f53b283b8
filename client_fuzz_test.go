package spoa

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"
)

// An agent may say anything: nothing panics, hangs or stays behind.
func FuzzClient(f *testing.F) {
	f.Add([]byte(fullHello), []byte(ackFrame(1, 1, setScore)+normalBye))
	f.Add([]byte(plainHello), []byte(ackFrame(1, 1, "")+ackFrame(3, 1, setScore+setScore)+normalBye))
	f.Add([]byte(fullHello+ackFrame(1, 1, "")), []byte(ackFrame(5, 1, "\x02\x02\x00\x01x")))
	f.Add([]byte(normalBye), []byte{})
	f.Add([]byte(fullHello), appendAck(nil, flagFIN|flagAbort, ids(1, 1), nil))
	f.Add([]byte(fullHello), []byte("\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, hello, rest []byte) {
		synctest.Test(t, func(t *testing.T) {
			near, far := net.Pipe()
			go func() { _, _ = io.Copy(io.Discard, far) }()
			sent := make(chan struct{})
			go func() {
				_, _ = far.Write(hello)
				<-sent
				_, _ = far.Write(rest)
				far.Close()
			}()
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			c, err := NewClient(ctx, near)
			defer close(sent)
			if err != nil {
				return
			}
			for range 3 {
				goNotify(ctx, c, checkIP("192.0.2.1"))
			}
			_ = c.Start(ignore, checkIP("192.0.2.1"))
			synctest.Wait()
			sent <- struct{}{}
			synctest.Wait()
			c.Close()
			if _, err := c.Notify(t.Context()); !errors.As(err, new(*DisconnectError)) {
				t.Errorf("after Close: %v", err)
			}
		})
	})
}
