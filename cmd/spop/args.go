package main

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/netip"
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

const argForm = "want [NAME=]TYPE:VALUE, such as src=ip:192.0.2.1"

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
			return nil, err
		}
	}
	return spoa.NewMessage(words[0], args...), nil
}

func parseArg(word string) (a spoa.Arg, err error) {
	typed := word
	if i := strings.IndexAny(word, "=:"); i >= 0 && word[i] == '=' {
		a.Name, typed = word[:i], word[i+1:]
	}
	kind, text, ok := strings.Cut(typed, ":")
	switch {
	case typed == "null":
		return a, nil
	case !ok && strings.HasPrefix(word, "-"):
		return a, misuse("argument %q: want flags before MESSAGE", word)
	case !ok || kind == "null":
		return a, misuse("argument %q: %s", word, argForm)
	}
	if a.Value, err = parseValue(kind, text); err != nil {
		return a, misuse("argument %q: %v", word, err)
	}
	return a, nil
}

func parseValue(kind, text string) (spoa.Value, error) {
	switch kind {
	case "bool":
		if text != "true" && text != "false" {
			return spoa.Value{}, errors.New("want bool:true or bool:false")
		}
		return spoa.Bool(text == "true"), nil
	case "int", "int64":
		i, err := parseInt(kind, text, 64)
		return spoa.Int64(i), err
	case "int32":
		i, err := parseInt(kind, text, 32)
		return spoa.Int32(int32(i)), err
	case "uint32":
		u, err := parseUint(kind, text, 32)
		return spoa.Uint32(uint32(u)), err
	case "uint64":
		u, err := parseUint(kind, text, 64)
		return spoa.Uint64(u), err
	case "ip":
		ip, err := netip.ParseAddr(text)
		if err != nil || ip.Zone() != "" {
			return spoa.Value{}, errors.New("want an address, such as ip:192.0.2.1 or ip:2001:db8::1")
		}
		return spoa.Addr(ip), nil
	case "str":
		return spoa.String(text), nil
	case "bin":
		if name, ok := strings.CutPrefix(text, "@"); ok {
			b, err := os.ReadFile(name)
			return spoa.Binary(b), err
		}
		return spoa.Binary([]byte(text)), nil
	case "hex":
		b, err := hex.DecodeString(text)
		if err != nil {
			return spoa.Value{}, errors.New("want an even number of hexadecimal digits, such as hex:00ff")
		}
		return spoa.Binary(b), nil
	}
	return spoa.Value{}, fmt.Errorf("no type %q: want null, bool, int, int32, int64, uint32, uint64, ip, str, bin or hex", kind)
}

func parseInt(kind, text string, bits int) (int64, error) {
	i, err := strconv.ParseInt(text, 10, bits)
	if err != nil {
		err = fmt.Errorf("want %s: and an integer from -2^%d to 2^%d-1", kind, bits-1, bits-1)
	}
	return i, err
}

func parseUint(kind, text string, bits int) (uint64, error) {
	u, err := strconv.ParseUint(text, 10, bits)
	if err != nil {
		err = fmt.Errorf("want %s: and an integer from 0 to 2^%d-1", kind, bits)
	}
	return u, err
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
