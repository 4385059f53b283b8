// Package judge gives addresses their scores: by reputation lists, by other
// sources, or by chance if there is neither. It owns the flags that name these,
// and the handler that answers HAProxy.
package judge

import (
	"context"
	"time"

	"github.com/go-kit/log"
	"github.com/spoa-go/spoa/cmd/internal/clientip"
	"github.com/spoa-go/spoa/cmd/internal/reputation"
	"github.com/spoa-go/spoa/cmd/internal/reputation/lists"
)

// A Judge judges addresses by what a Config names. Its methods may be called
// concurrently.
type Judge struct {
	lists   *lists.Lists // nil: none
	sources *sources     // nil: none but lists
	find    clientip.Finder
}

// Open loads lists and opens all other sources.
func (c *Config) Open(ctx context.Context, logger log.Logger) (*Judge, error) {
	l, err := c.openLists(ctx, logger)
	if err != nil {
		return nil, err
	}
	s, err := c.openSources(l, logger)
	if err != nil {
		return nil, err
	}
	return &Judge{lists: l, sources: s, find: clientip.Finder{Proxies: c.Proxies}}, nil
}

// openLists loads the lists, and returns nil if there are none.
func (c *Config) openLists(ctx context.Context, logger log.Logger) (*lists.Lists, error) {
	if len(c.Reputation)+len(c.Allow) == 0 {
		return nil, nil
	}
	return lists.Open(ctx, lists.Options{
		Logger: logger, Block: c.Reputation, Allow: c.Allow, Refresh: c.Refresh, Cache: c.Cache,
	})
}

// Lists returns the lists, nil if there are none.
func (j *Judge) Lists() *lists.Lists { return j.lists }

// Sources returns all sources, lists among them. It returns nil if there are none
// but lists, and these are not monitored.
func (j *Judge) Sources() *reputation.Combined { return j.sources.combined() }

// prepareTimeout is how long a start waits for what sources must know.
const prepareTimeout = 2 * time.Second

// Prepare lets sources learn what they must know before they can judge, for two
// seconds at most. What fails is logged, and tried again by the Tasks.
func (j *Judge) Prepare(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, prepareTimeout)
	defer cancel()
	_ = j.sources.prepare(ctx) // logs
}

// Tasks returns the functions that keep lists and sources up to date. Each runs
// until its context ends.
func (j *Judge) Tasks() (tasks []func(context.Context) error) {
	if j.lists != nil {
		tasks = append(tasks, j.lists.Watch)
	}
	if j.sources != nil {
		tasks = append(tasks, j.sources.run...)
	}
	return tasks
}

// Reload reads all files again. What cannot be used is logged; the old content
// stays in force.
func (j *Judge) Reload(ctx context.Context) {
	if j.lists != nil {
		_ = j.lists.Reload(ctx) // logs
	}
	j.sources.reloadAll()
}
