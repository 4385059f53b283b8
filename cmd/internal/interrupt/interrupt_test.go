package interrupt

import (
	"context"
	"errors"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/oklog/run"
)

func TestWait(t *testing.T) {
	failed := errors.New("failed")
	for _, want := range []error{nil, failed} {
		if v, err := Wait(nil, func(context.Context) (int, error) { return 7, want }); v != 7 || err != want {
			t.Errorf("want 7, %v, have %d, %v", want, v, err)
		}
	}
}

func TestWaitInterrupted(t *testing.T) {
	signals := make(chan os.Signal, 1)
	signals <- os.Interrupt
	cancelled, hang := make(chan struct{}), make(chan struct{})
	v, err := Wait(signals, func(ctx context.Context) (int, error) {
		<-ctx.Done()
		close(cancelled)
		<-hang
		return 7, nil
	})
	var sig *run.SignalError
	if v != 0 || !errors.As(err, &sig) || sig.Signal != os.Interrupt {
		t.Errorf("want the signal, have %d, %v", v, err)
	}
	<-cancelled
	close(hang)
}

func TestActor(t *testing.T) {
	failed := errors.New("failed")
	execute, interrupt := Actor(func(context.Context) error { return failed })
	if err := execute(); err != failed {
		t.Errorf("want what the function returns, have %v", err)
	}
	interrupt(nil)
	execute, interrupt = Actor(func(ctx context.Context) error {
		<-ctx.Done()
		return nil
	})
	interrupt(nil) // oklog/run may do so before it executes
	if err := execute(); err != nil {
		t.Errorf("want what the function returns, have %v", err)
	}
}

func TestActorHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hang := make(chan struct{})
		defer close(hang)
		execute, interrupt := Actor(func(context.Context) error {
			<-hang
			return nil
		})
		began := time.Now()
		time.AfterFunc(time.Hour, func() { interrupt(nil) })
		if err := execute(); !errors.Is(err, context.Canceled) || time.Since(began) != time.Hour+lastWait {
			t.Errorf("want the wait ended after %v, have %v after %v", lastWait, err, time.Since(began)-time.Hour)
		}
	})
}
