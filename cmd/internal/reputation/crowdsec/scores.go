package crowdsec

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/spoa-go/spoa/cmd/internal/reputation"
)

// other stands for all types of decisions that have no score of their own.
const other = "other"

// Scores are those of the types of decisions. It is a flag.Value of TYPE=SCORE.
type Scores map[string]uint8

// DefaultScores returns what decisions are worth unless told otherwise.
func DefaultScores() Scores { return Scores{"ban": 0, "captcha": 30, other: 50} }

func (s Scores) of(kind string) uint8 {
	if score, ok := s[kind]; ok {
		return score
	}
	return s[other]
}

// String returns the scores by type.
func (s *Scores) String() string {
	var all []string
	for _, kind := range slices.Sorted(maps.Keys(*s)) {
		all = append(all, fmt.Sprintf("%s=%d", kind, (*s)[kind]))
	}
	return strings.Join(all, ",")
}

// Set gives a type a score, or all types without one if it is called other.
func (s *Scores) Set(text string) error {
	kind, number, ok := strings.Cut(text, "=")
	score, err := strconv.ParseUint(number, 10, 8)
	if !ok || kind == "" || err != nil || score > reputation.BestScore {
		return fmt.Errorf("want TYPE=SCORE, such as captcha=30, with a score from 0 to %d", reputation.BestScore)
	}
	if *s == nil {
		*s = DefaultScores()
	}
	(*s)[strings.ToLower(kind)] = uint8(score)
	return nil
}
