package main

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/spoa-go/spoa"
)

const argsUsage = `Arguments are [NAME=]TYPE:VALUE; without NAME= the name is empty, as with
HAProxy's "args src". An integer of HAProxy's always is an int.

  null               bool:true          str:TEXT
  int:-3 (= int64)   int32:-3           bin:TEXT
  uint64:3           uint32:3           bin:@FILE
  ip:192.0.2.1       ip:2001:db8::1     hex:00ff (a bin)
`

// parseMessage parses MESSAGE [NAME=]TYPE:VALUE...
func parseMessage(words []string) (*spoa.Message, error) {
	if len(words) == 0 || words[0] == "" {
		return nil, misuse("no MESSAGE: want MESSAGE [NAME=]TYPE:VALUE..., such as check-client-ip src=ip:192.0.2.1")
	}
	if n := len(words) - 1; n > math.MaxUint8 {
		return nil, misuse("%d arguments: want at most 255", n)
	}
	args := make([]spoa.Arg, len(words)-1)
	for i, w := range words[1:] {
		var err error
		if args[i], err = parseArg(w); err != nil {
			return nil, misuse("argument %q: %v", w, err)
		}
	}
	return spoa.NewMessage(words[0], args...), nil
}

// parseArg parses a word of the command line, whose value is as it stands: the
// shell has dealt with quotes.
func parseArg(word string) (spoa.Arg, error) {
	text := word
	head, value, typed := strings.Cut(word, ":")
	switch {
	case !typed && strings.HasPrefix(word, "-"):
		return spoa.Arg{}, errors.New("want flags before MESSAGE")
	case typed && strings.HasPrefix(value, "@") && (head == "bin" || strings.HasSuffix(head, "=bin")):
		b, err := os.ReadFile(value[1:])
		if err != nil {
			return spoa.Arg{}, err
		}
		value = string(b)
	}
	if typed {
		text = head + ":" + strconv.Quote(value)
	}
	m, err := spoa.ParseMessage("m " + text)
	switch {
	case err != nil:
		return spoa.Arg{}, innermost(err) // which does not name the argument
	case m.Len() != 1:
		return spoa.Arg{}, errors.New("want one argument in a word, [NAME=]TYPE:VALUE, such as src=ip:192.0.2.1")
	}
	return m.Arg(0), nil
}

func innermost(err error) error {
	for inner := errors.Unwrap(err); inner != nil; inner = errors.Unwrap(err) {
		err = inner
	}
	return err
}

// variable is a flag: SCOPE.NAME.
type variable struct {
	scope spoa.Scope
	name  string
}

func (v *variable) String() string {
	if v.name == "" {
		return ""
	}
	return v.scope.String() + "." + v.name
}

func (v *variable) Set(s string) error {
	scope, name, _ := strings.Cut(s, ".")
	for v.scope = spoa.ScopeProc; v.scope <= spoa.ScopeRes; v.scope++ {
		if v.name = name; scope == v.scope.String() && name != "" {
			return nil
		}
	}
	return errors.New("not of the form SCOPE.NAME, such as sess.ip_score")
}

// kindName is the type that an argument of that kind has.
func kindName(k spoa.Kind) string {
	switch k {
	case spoa.KindInt64:
		return "int"
	case spoa.KindIPv4, spoa.KindIPv6:
		return "ip"
	case spoa.KindString:
		return "str"
	case spoa.KindBinary:
		return "bin"
	}
	return k.String()
}

// formatAction returns an action on one line: set-var sess.ip_score int 42.
func formatAction(a spoa.Action) string {
	if a.Unset {
		return fmt.Sprintf("unset-var %v.%s", a.Scope, printable(a.Name))
	}
	kind, text := kindName(a.Value.Kind()), a.Value.String()
	switch a.Value.Kind() {
	case spoa.KindNull:
		return fmt.Sprintf("set-var %v.%s null", a.Scope, printable(a.Name))
	case spoa.KindString:
		text = printable(text)
	case spoa.KindBinary:
		if printable(text) != text || strings.HasPrefix(text, "@") {
			kind, text = "hex", hex.EncodeToString([]byte(text))
		}
	}
	return fmt.Sprintf("set-var %v.%s %s %s", a.Scope, printable(a.Name), kind, text)
}

// printable returns s, quoted if it would not show as it is on one line.
func printable(s string) string {
	for _, r := range s {
		if !unicode.IsPrint(r) || r == utf8.RuneError {
			return strconv.Quote(s)
		}
	}
	if strings.HasPrefix(s, `"`) {
		return strconv.Quote(s)
	}
	return s
}

// answerJSON is an answer as notify -json prints it.
type answerJSON struct {
	Microseconds float64      `json:"us"`
	Actions      []actionJSON `json:"actions"`
}

type actionJSON struct {
	Action string `json:"action"`
	Scope  string `json:"scope"`
	Name   string `json:"name"`
	Type   string `json:"type,omitempty"`
	Value  any    `json:"value,omitempty"` // bin: base64
}

func actionsJSON(actions []spoa.Action) []actionJSON {
	list := make([]actionJSON, len(actions))
	for i, a := range actions {
		j := actionJSON{Action: "set-var", Scope: a.Scope.String(), Name: a.Name}
		if a.Unset {
			j.Action = "unset-var"
		} else {
			j.Type, j.Value = kindName(a.Value.Kind()), valueJSON(a.Value)
		}
		list[i] = j
	}
	return list
}

func valueJSON(v spoa.Value) any {
	switch v.Kind() {
	case spoa.KindNull:
		return nil
	case spoa.KindBool, spoa.KindInt32, spoa.KindUint32, spoa.KindInt64, spoa.KindUint64:
		return json.RawMessage(v.String())
	case spoa.KindBinary:
		return base64.StdEncoding.EncodeToString(v.Bytes())
	}
	return v.String()
}
