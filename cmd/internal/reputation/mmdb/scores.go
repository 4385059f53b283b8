package mmdb

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/spoa-go/spoa/cmd/internal/reputation"
)

// Countries is a reputation.Source of scores by country, and a flag.Value of
// CC=SCORE.
type Countries map[string]reputation.Finding

// String returns the countries.
func (c *Countries) String() string { return strings.Join(slices.Sorted(maps.Keys(*c)), ",") }

// Set gives a country a score.
func (c *Countries) Set(text string) error {
	country, worth, ok := strings.Cut(text, "=")
	country = strings.ToUpper(country)
	if !ok || !isCountry(country) {
		return fmt.Errorf("%.40q: want CC=SCORE, with the country's two letters of ISO 3166", text)
	}
	score, err := parseScore(worth)
	if err != nil {
		return err
	}
	if *c == nil {
		*c = Countries{}
	}
	(*c)[country] = reputation.Finding{Source: "country", State: reputation.Listed, Score: score, Reason: "country " + country}
	return nil
}

func isCountry(s string) bool {
	letter := func(b byte) bool { return 'A' <= b && b <= 'Z' }
	return len(s) == 2 && letter(s[0]) && letter(s[1])
}

// Judge implements reputation.Source. It never waits.
func (c Countries) Judge(_ context.Context, s reputation.Subject) reputation.Finding {
	if f, ok := c[s.Country]; ok {
		return f
	}
	return reputation.Finding{Source: "country"}
}

// Status implements reputation.Reporter.
func (c Countries) Status() reputation.Status {
	return reputation.Status{Name: "country", Kind: "country", Entries: len(c)}
}

func parseScore(s string) (uint8, error) {
	n, err := strconv.ParseUint(s, 10, 8)
	if err != nil || n > reputation.BestScore {
		return 0, fmt.Errorf("%.40q: want a score from 0 to %d", s, reputation.BestScore)
	}
	return uint8(n), nil
}
