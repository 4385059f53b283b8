package settings

import (
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Multi marks a flag that collects its values: being given several times is not
// odd, and its variable holds several.
func Multi(v flag.Value) flag.Value { return multi{v} }

type multi struct{ flag.Value }

// value makes a flag of what sets it.
type value func(string) error

// String implements flag.Value. The usage text has the defaults.
func (v value) String() string { return "" }

// Set implements flag.Value.
func (v value) Set(s string) error { return v(s) }

// List returns a flag that collects texts.
func List(texts *[]string) flag.Value {
	return Multi(value(func(s string) error {
		*texts = append(*texts, s)
		return nil
	}))
}

// Number returns a flag that is an integer from least to most, of what the error
// names, such as "a port".
func Number(n *int, least, most int, of string) flag.Value {
	return value(func(s string) error {
		v, err := strconv.Atoi(s)
		if err != nil || v < least || v > most {
			return fmt.Errorf("want %s from %d to %d", of, least, most)
		}
		*n = v
		return nil
	})
}

// Period returns a flag that is a duration of 0 or more.
func Period(d *time.Duration) flag.Value {
	return value(func(s string) error {
		v, err := time.ParseDuration(s)
		if err != nil || v < 0 {
			return errors.New("want a time with its unit, such as 500ms or 10s")
		}
		*d = v
		return nil
	})
}

// Delay returns a flag that is a duration of 0 or more, in milliseconds if it has
// no unit.
func Delay(d *time.Duration) flag.Value {
	return value(func(s string) error {
		if _, err := strconv.ParseUint(s, 10, 31); err == nil {
			s += "ms"
		}
		v, err := time.ParseDuration(s)
		if err != nil || v < 0 {
			return errors.New("want a time such as 15 (milliseconds), 10us, 15ms or 1s")
		}
		*d = v
		return nil
	})
}

// FileMode returns a flag that is permissions, in octal.
func FileMode(m *fs.FileMode) flag.Value {
	return value(func(s string) error {
		n, err := strconv.ParseUint(s, 8, 32)
		if err != nil || n > 0o777 {
			return errors.New("want permissions in octal, such as 0660")
		}
		*m = fs.FileMode(n)
		return nil
	})
}

// Choice returns a flag that is one of two or more words.
func Choice(word *string, words ...string) flag.Value {
	return value(func(s string) error {
		if !slices.Contains(words, s) {
			last := len(words) - 1
			return fmt.Errorf("want %s or %s", strings.Join(words[:last], ", "), words[last])
		}
		*word = s
		return nil
	})
}

// Prefixes returns a flag that collects addresses and prefixes.
func Prefixes(prefixes *[]netip.Prefix) flag.Value {
	return Multi(value(func(s string) error {
		prefix, err := netip.ParsePrefix(s)
		if err != nil {
			addr, err := netip.ParseAddr(s)
			if err != nil {
				return errors.New("want an address or a prefix, such as 192.0.2.0/24")
			}
			prefix = netip.PrefixFrom(addr, addr.BitLen())
		}
		*prefixes = append(*prefixes, prefix.Masked())
		return nil
	}))
}
