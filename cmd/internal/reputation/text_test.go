package reputation

import (
	"strings"
	"testing"
	"unicode/utf8"
)

func TestText(t *testing.T) {
	for s, want := range map[string]string{
		"":                             "",
		"crowdsecurity/ssh-bf":         "crowdsecurity/ssh-bf",
		"a\r\nSet-Cookie: b\x00\u202e": "a??Set-Cookie: b??",
		"Zürich\xff":                   "Zürich?",
		strings.Repeat("a", 300):       strings.Repeat("a", 200),
		strings.Repeat("ü", 300):       strings.Repeat("ü", 100),
		"a" + strings.Repeat("ü", 300): "a" + strings.Repeat("ü", 99),
	} {
		if have := Text(s); have != want {
			t.Errorf("%q: want %q, have %q", s, want, have)
		}
	}
}

func TestPrintable(t *testing.T) {
	for s, want := range map[string]string{
		"":                       "",
		`a "b" \n ü`:             `a "b" \n ü`,
		"a\nb\x1b[31m\x00":       `a\nb\x1b[31m\x00`,
		"\xff\u202e\"":           `\xff\u202e\"`,
		strings.Repeat("a", 300): strings.Repeat("a", 300),
	} {
		if have := Printable(s); have != want {
			t.Errorf("%q: want %q, have %q", s, want, have)
		}
	}
}

func FuzzText(f *testing.F) {
	f.Add("a\r\nb\xff")
	f.Fuzz(func(t *testing.T, s string) {
		have := Text(s)
		if len(have) > maxText || !utf8.ValidString(have) || strings.ContainsAny(have, "\r\n\x00") {
			t.Errorf("%q: have %q", s, have)
		}
	})
}
