package reputation

import (
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// maxText is more than sources have to say, and fits into a header.
const maxText = 200

// Text returns s as it may become a part of a header or of a log: without
// characters that are not printable, and cut if it has more than 200 bytes.
// Sources must use it for what comes from elsewhere.
func Text(s string) string {
	s = strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
	if len(s) <= maxText {
		return s
	}
	end := maxText
	for !utf8.RuneStart(s[end]) {
		end--
	}
	return s[:end]
}

// Printable returns s as it is if all of it is printable, and otherwise escaped as
// in a string of Go, so that different texts stay different.
func Printable(s string) string {
	if utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return s
	}
	quoted := strconv.Quote(s)
	return quoted[1 : len(quoted)-1]
}
