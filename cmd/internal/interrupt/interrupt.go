// Package interrupt ends the wait for what may hang for ever, such as reading a
// file of a network that is down.
package interrupt

import (
	"context"
	"os"
	"time"

	"github.com/oklog/run"
)

// Wait calls f and returns what it returns. A signal ends the wait for it at once,
// with a run.SignalError: f is left to itself then, and its context is cancelled.
func Wait[T any](signals <-chan os.Signal, f func(context.Context) (T, error)) (T, error) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	go func() {
		v, err := f(ctx)
		done <- result{v, err}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case sig := <-signals:
		var none T
		return none, &run.SignalError{Signal: sig}
	}
}

// lastWait is how long an actor's end waits for what has been told to end.
const lastWait = time.Second

// Actor makes an actor of a group of oklog/run of f, which runs until its context
// is cancelled. If f does not return within a second of that, it is left to itself
// and the actor returns the context's error.
func Actor(f func(context.Context) error) (execute func() error, interrupt func(error)) {
	ctx, cancel := context.WithCancel(context.Background())
	execute = func() error {
		done := make(chan error, 1)
		go func() { done <- f(ctx) }()
		select {
		case err := <-done:
			return err
		case <-ctx.Done():
		}
		t := time.NewTimer(lastWait)
		defer t.Stop()
		select {
		case err := <-done:
			return err
		case <-t.C:
			return ctx.Err()
		}
	}
	return execute, func(error) { cancel() }
}
