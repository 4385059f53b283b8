package judge

import (
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spoa-go/spoa/cmd/internal/reputation"
	"github.com/spoa-go/spoa/cmd/internal/reputation/crowdsec"
	"github.com/spoa-go/spoa/cmd/internal/reputation/dnsbl"
	"github.com/spoa-go/spoa/cmd/internal/reputation/lists"
	"github.com/spoa-go/spoa/cmd/internal/reputation/mmdb"
	"github.com/spoa-go/spoa/cmd/internal/settings"
)

// Config is what flags say of lists, other sources, and what to do with them.
type Config struct {
	Reputation lists.Files
	Allow      lists.AllowFiles
	Refresh    time.Duration // how often lists by URL are fetched
	Cache      string        // directory of their copies; empty: none
	Random     *bool         // nil: not said
	Proxies    []netip.Prefix
	LookUp     string // the address that WriteLookUp explains; empty: none

	CrowdSec         string // URL of the local API; empty: none
	CrowdSecKey      string // file, or the key itself if it comes from the environment
	CrowdSecScores   crowdsec.Scores
	CrowdSecInterval time.Duration

	Zones     dnsbl.Zones
	DNS       string // server; empty: the system's
	Databases []string
	Countries mmdb.Countries
	Networks  mmdb.NetworkFlags

	Budget    time.Duration // how long a verdict may wait
	Monitor   bool
	Replay    string // the log that WriteReplay reads; empty: none
	DenyBelow int    // the lowest score that -monitor and -replay let pass
}

// DefaultConfig returns the values of flags that are not given.
func DefaultConfig() Config {
	return Config{Refresh: time.Hour, CrowdSecInterval: crowdsec.DefaultInterval, Budget: 5 * time.Millisecond, DenyBelow: 20}
}

// Register defines the flags, which set c.
func (c *Config) Register(flags *flag.FlagSet) {
	flags.Var(settings.Multi(&c.Reputation), "reputation", "")
	flags.Var(settings.Multi(&c.Allow), "allow", "")
	flags.Var(settings.Period(&c.Refresh), "refresh", "")
	flags.StringVar(&c.Cache, "cache", "", "")
	flags.BoolFunc("random", "", func(s string) error {
		random, err := strconv.ParseBool(s)
		c.Random = &random
		return err
	})
	flags.Var(settings.Prefixes(&c.Proxies), "trust-proxy", "")
	flags.StringVar(&c.LookUp, "lookup", "", "")
	flags.StringVar(&c.CrowdSec, "crowdsec", "", "")
	flags.StringVar(&c.CrowdSecKey, "crowdsec-key", "", "")
	flags.Var(settings.Multi(&c.CrowdSecScores), "crowdsec-score", "")
	flags.Var(settings.Period(&c.CrowdSecInterval), "crowdsec-interval", "")
	flags.Var(settings.Multi(&c.Zones), "dnsbl", "")
	flags.StringVar(&c.DNS, "dns", "", "")
	flags.Var(settings.List(&c.Databases), "mmdb", "")
	flags.Var(settings.Multi(&c.Countries), "country", "")
	flags.Var(settings.Multi(&c.Networks), "asn", "")
	flags.Var(settings.Period(&c.Budget), "budget", "")
	flags.BoolVar(&c.Monitor, "monitor", false, "")
	flags.StringVar(&c.Replay, "replay", "", "")
	flags.Var(settings.Number(&c.DenyBelow, 0, reputation.BestScore, "a score"), "deny-below", "")
}

// Validate finds values that do not go together. Notes are what is odd but no
// error.
func (c *Config) Validate() (notes []string, err error) {
	lists := len(c.Reputation)+len(c.Allow) > 0
	switch judged := lists || c.hasSources(); {
	case c.Random != nil && *c.Random && judged:
		return nil, errors.New("-random and lists or other sources: want one of them")
	case c.Random != nil && !*c.Random && !judged:
		return nil, errors.New("no list, and random scores are switched off: want -reputation FILE, or -random to try out")
	case c.Random == nil && !judged:
		notes = []string{"no list: scores are random, for trying out only; want -reputation FILE, or -random to say so"}
	}
	if err := c.validateLists(); err != nil {
		return nil, err
	}
	return notes, c.validateSources()
}

// validateLists finds lists that are named twice, and what cannot be in lists.
func (c *Config) validateLists() error {
	for _, flag := range []struct {
		name  string
		files []lists.File
	}{{"-reputation", c.Reputation}, {"-allow", c.Allow}} {
		seen := make(map[string]bool)
		for _, f := range flag.files {
			if seen[f.Path] {
				return fmt.Errorf("%s %s: given twice", flag.name, f.Path)
			}
			seen[f.Path] = true
		}
	}
	if c.Refresh < time.Minute {
		return fmt.Errorf("-refresh %v: want at least 1m", c.Refresh)
	}
	if c.LookUp != "" {
		if _, err := netip.ParseAddr(c.LookUp); err != nil {
			return fmt.Errorf("-lookup %q: want an address", c.LookUp)
		}
	}
	return nil
}

func (c *Config) validateSources() error {
	scored := len(c.Countries)+len(c.Networks.Numbers)+len(c.Networks.Files) > 0
	switch {
	case c.CrowdSecKey != "" && c.CrowdSec == "":
		return errors.New("-crowdsec-key needs -crowdsec")
	case c.CrowdSec != "" && c.CrowdSecKey == "":
		return errors.New("-crowdsec needs -crowdsec-key FILE, or SPOA_CROWDSEC_KEY with the key")
	case c.CrowdSecInterval <= 0:
		return fmt.Errorf("-crowdsec-interval %v: want more than 0", c.CrowdSecInterval)
	case scored && len(c.Databases) == 0:
		return errors.New("-country and -asn need -mmdb, to know where addresses belong")
	}
	return nil
}

// Waits reports whether a verdict may have to wait. Only DNS block lists do.
func (c *Config) Waits() bool { return len(c.Zones) > 0 }

// hasSources reports whether there is a source other than lists.
func (c *Config) hasSources() bool { return c.CrowdSec != "" || len(c.Zones)+len(c.Databases) > 0 }

// readKey returns the key of CrowdSec's local API. The flag takes its value from
// SPOA_CROWDSEC_KEY too, but that is not the name of a file.
func (c *Config) readKey() (string, error) {
	if c.CrowdSecKey == os.Getenv("SPOA_CROWDSEC_KEY") {
		return c.CrowdSecKey, nil
	}
	b, err := os.ReadFile(c.CrowdSecKey)
	if err != nil {
		return "", fmt.Errorf("-crowdsec-key: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}
