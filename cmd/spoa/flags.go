package main

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"time"
)

// stringList collects the values of a flag.
type stringList []string

func (l *stringList) String() string { return strings.Join(*l, ",") }

func (l *stringList) Set(s string) error {
	*l = append(*l, s)
	return nil
}

// number is a flag: an integer from least to most.
type number struct {
	value       *int
	least, most int
	of          string // what it counts
}

func (n number) String() string { return "" }

func (n number) Set(s string) error {
	v, err := strconv.Atoi(s)
	if err != nil || v < n.least || v > n.most {
		return fmt.Errorf("want %s from %d to %d", n.of, n.least, n.most)
	}
	*n.value = v
	return nil
}

// period is a flag: a duration.
type period struct{ value *time.Duration }

func (p period) String() string { return "" }

func (p period) Set(s string) error {
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return errors.New("want a time with its unit, such as 500ms or 10s")
	}
	*p.value = d
	return nil
}

// delay is a flag: a duration, or milliseconds without a unit.
type delay time.Duration

func (d *delay) String() string { return "" }

func (d *delay) Set(s string) error {
	if _, err := strconv.ParseUint(s, 10, 31); err == nil {
		s += "ms"
	}
	t, err := time.ParseDuration(s)
	if err != nil || t < 0 {
		return errors.New("want a time such as 15 (milliseconds), 10us, 15ms or 1s")
	}
	*d = delay(t)
	return nil
}

// fileMode is a flag: permissions, in octal.
type fileMode fs.FileMode

func (m *fileMode) String() string { return "" }

func (m *fileMode) Set(s string) error {
	n, err := strconv.ParseUint(s, 8, 32)
	if err != nil || n > 0o777 {
		return errors.New("want permissions in octal, such as 0660")
	}
	*m = fileMode(n)
	return nil
}

// choice is a flag: one of several words.
type choice struct {
	value *string
	words []string
}

func (c choice) String() string { return "" }

func (c choice) Set(s string) error {
	if !slices.Contains(c.words, s) {
		last := len(c.words) - 1
		return fmt.Errorf("want %s or %s", strings.Join(c.words[:last], ", "), c.words[last])
	}
	*c.value = s
	return nil
}
