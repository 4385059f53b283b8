package spoa

import (
	"fmt"
	"math"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
)

func TestDecode(t *testing.T) {
	type (
		score uint8
		host  string
		blob  []byte
		flag  bool
	)
	type all struct {
		Int     int        `spoe:"n"`
		Int8    int8       `spoe:"n"`
		Int16   int16      `spoe:"n"`
		Int32   int32      `spoe:"n"`
		Int64   int64      `spoe:"n"`
		Uint    uint       `spoe:"n"`
		Uint8   uint8      `spoe:"n"`
		Uint16  uint16     `spoe:"n"`
		Uint32  uint32     `spoe:"n"`
		Uint64  uint64     `spoe:"n"`
		Uintptr uintptr    `spoe:"n"`
		Bool    bool       `spoe:"b"`
		String  string     `spoe:"s"`
		Binary  []byte     `spoe:"s"`
		Text    string     `spoe:"bin"`
		IP      netip.Addr `spoe:"#0"`
		First   int        `spoe:"#1"`
		Unnamed netip.Addr `spoe:""`

		Score score `spoe:"n"`
		Host  host  `spoe:"s"`
		Blob  blob  `spoe:"s"`
		Flag  flag  `spoe:"b"`

		Absent  int    `spoe:"absent,optional"`
		Beyond  int    `spoe:"#255,optional"`
		Null    string `spoe:"null,optional"`
		Present int    `spoe:"n,optional"`

		Untagged int
		Other    int `json:"n"`
		hidden   int
	}
	ip := netip.MustParseAddr("192.0.2.1")
	m := NewMessage("m", Arg{"", ipv6("::ffff:192.0.2.1")}, Arg{"n", Int64(42)}, Arg{"b", Bool(true)},
		Arg{"s", String("text")}, Arg{"bin", Binary([]byte("\x00\xff"))}, Arg{"null", Value{}}, Arg{"n", Int64(43)})
	have := all{Absent: 1, Beyond: 2, Null: "kept", Untagged: 3, Other: 4, hidden: 5}
	if err := m.Decode(&have); err != nil {
		t.Fatal(err)
	}
	want := all{
		Int: 42, Int8: 42, Int16: 42, Int32: 42, Int64: 42, Uint: 42, Uint8: 42, Uint16: 42, Uint32: 42, Uint64: 42, Uintptr: 42,
		Bool: true, String: "text", Binary: []byte("text"), Text: "\x00\xff", IP: ip, First: 42, Unnamed: ip,
		Score: 42, Host: "text", Blob: blob("text"), Flag: true,
		Absent: 1, Beyond: 2, Null: "kept", Present: 42, Untagged: 3, Other: 4, hidden: 5,
	}
	if !reflect.DeepEqual(want, have) {
		t.Errorf("want %+v, have %+v", want, have)
	}
}

// into returns a pointer to a struct whose only field, of type T, is tagged v.
func into[T any]() any {
	return new(struct {
		V T `spoe:"v"`
	})
}

func TestDecodeField(t *testing.T) {
	ip := netip.MustParseAddr("192.0.2.1")
	for _, tt := range []struct {
		v    Value
		dst  any
		want string // the field's value, or what the error says after "argument v: "
	}{
		{Int64(127), into[int8](), "127"},
		{Int64(128), into[int8](), "want int8, have int64 128"},
		{Int64(-128), into[int8](), "-128"},
		{Int64(-129), into[int8](), "want int8, have int64 -129"},
		{Int32(math.MinInt16), into[int16](), "-32768"},
		{Int32(math.MinInt16 - 1), into[int16](), "want int16, have int32 -32769"},
		{Uint32(math.MaxInt32), into[int32](), "2147483647"},
		{Uint32(math.MaxInt32 + 1), into[int32](), "want int32, have uint32 2147483648"},
		{Int64(math.MinInt64), into[int64](), "-9223372036854775808"},
		{Uint64(math.MaxInt64), into[int64](), "9223372036854775807"},
		{Uint64(math.MaxInt64 + 1), into[int64](), "want int64, have uint64 9223372036854775808"},
		{Int64(255), into[uint8](), "255"},
		{Int64(256), into[uint8](), "want uint8, have int64 256"},
		{Int64(-1), into[uint8](), "want uint8, have int64 -1"},
		{Int64(65536), into[uint16](), "want uint16, have int64 65536"},
		{Int64(1 << 32), into[uint32](), "want uint32, have int64 4294967296"},
		{Uint64(math.MaxUint64), into[uint64](), "18446744073709551615"},
		{Int64(-1), into[uint64](), "want uint64, have int64 -1"},
		{Int64(-1), into[uint](), "want uint, have int64 -1"},
		{Bool(true), into[int](), "want int, have bool true"},
		{String("1"), into[int](), "want int, have string 1"},
		{String(strings.Repeat("x", 8<<10)), into[int](), "want int, have string " + strings.Repeat("x", 40)},
		{Bool(false), into[bool](), "false"},
		{Int64(1), into[bool](), "want bool, have int64 1"},
		{String("true"), into[bool](), "want bool, have string true"},
		{Binary([]byte("ab")), into[string](), "ab"},
		{Int64(1), into[string](), "want string, have int64 1"},
		{Addr(ip), into[string](), "want string, have ipv4 192.0.2.1"},
		{String(""), into[[]byte](), "[]"},
		{Bool(true), into[[]byte](), "want []uint8, have bool true"},
		{Addr(ip), into[netip.Addr](), "192.0.2.1"},
		{String("192.0.2.1"), into[netip.Addr](), "want netip.Addr, have string 192.0.2.1"},
		{Value{}, into[netip.Addr](), "want netip.Addr, have null"},
		{Value{}, into[[]byte](), "want []uint8, have null"},
	} {
		err := NewMessage("m", Arg{"v", tt.v}).Decode(tt.dst)
		field := reflect.ValueOf(tt.dst).Elem().Field(0)
		have := fmt.Sprint(field)
		if err != nil {
			have = strings.TrimPrefix(err.Error(), "spoa: message m: argument v: ")
			if !field.IsZero() {
				t.Errorf("%v %.40v into %v: want the field as it was, have %v", tt.v.kind, tt.v, field.Type(), field)
			}
		}
		if tt.want != have {
			t.Errorf("%v %.40v into %v: want %s, have %.100s", tt.v.kind, tt.v, field.Type(), tt.want, have)
		}
	}
}

// A Value and a pointer tell what is absent, NULL and empty apart, also in a
// struct that is used again.
func TestDecodePresence(t *testing.T) {
	var dst struct {
		Value   Value       `spoe:"v,optional"`
		Text    *string     `spoe:"v,optional"`
		Null    Value       `spoe:"null"`
		Pointer *int16      `spoe:"null"`
		First   Value       `spoe:"#0"`
		Again   *Value      // no tag
		Addr    *netip.Addr `spoe:"ip,parse,optional"`
	}
	null, ip := Arg{"null", Value{}}, Arg{"ip", String("192.0.2.1")}
	for _, tt := range []struct {
		what string
		args []Arg
		want string
	}{
		{"a string", []Arg{{"v", String("x")}, null, ip}, `string "x" "x" ipv4 string`},
		{"an empty one", []Arg{{"v", String("")}, null}, `string "" "" string`},
		{"the first counts", []Arg{{"v", String("1")}, {"v", String("2")}, null}, `string "1" "1" string`},
		{"NULL", []Arg{{"v", Value{}}, null}, `null <null> nil null`},
		{"the first counts if it is NULL", []Arg{{"v", Value{}}, {"v", String("2")}, null}, `null <null> nil null`},
		{"none", []Arg{null}, `null <null> nil null`},
	} {
		if err := NewMessage("m", tt.args...).Decode(&dst); err != nil {
			t.Errorf("%s: %v", tt.what, err)
			continue
		}
		have := fmt.Sprintf("%v %q ", dst.Value.Kind(), dst.Value)
		if dst.Text == nil {
			have += "nil "
		} else {
			have += strconv.Quote(*dst.Text) + " "
		}
		if dst.Addr != nil {
			have += Addr(*dst.Addr).Kind().String() + " "
		}
		have += dst.First.Kind().String()
		if tt.want != have || !dst.Null.Equal(Value{}) || dst.Pointer != nil {
			t.Errorf("%s: want %s, have %s, with %v and %v for NULL", tt.what, tt.want, have, dst.Null, dst.Pointer)
		}
	}
	for _, tt := range []struct {
		args []Arg
		want string
	}{
		{nil, "spoa: message m: argument null: want spoa.Value, have nothing"},
		{[]Arg{{"null", Int64(1 << 15)}}, "spoa: message m: argument null: want int16, have int64 32768"},
		{[]Arg{null, {"v", Int64(1)}}, "spoa: message m: argument v: want string, have int64 1"},
	} {
		dst.Text, dst.Pointer = nil, nil
		if err := NewMessage("m", tt.args...).Decode(&dst); err == nil || err.Error() != tt.want || dst.Text != nil || dst.Pointer != nil {
			t.Errorf("want %s and no value, have %v, %v and %v", tt.want, err, dst.Text, dst.Pointer)
		}
	}
}

// A Value is a view, so Decode allocates nothing for it.
func TestDecodeView(t *testing.T) {
	body := []byte("\x04body\x09\x05hello")
	m := &Message{name: "m", count: 1, args: body}
	var dst struct {
		Body Value `spoe:"body"`
	}
	wantAllocs(t, "Decode a Value", 0, func() {
		if err := m.Decode(&dst); err != nil {
			t.Fatal(err)
		}
	})
	if &dst.Body.Bytes()[0] != &body[7] {
		t.Error("want a view of the frame, have a copy")
	}
}

func TestDecodeParse(t *testing.T) {
	for _, tt := range []struct {
		v    Value
		want string
	}{
		{String("192.0.2.1"), "192.0.2.1"},
		{String(" 2001:db8::1\t"), "2001:db8::1"}, // as a header field may have it
		{Binary([]byte("::ffff:192.0.2.1")), "192.0.2.1"},
		{Addr(netip.MustParseAddr("192.0.2.2")), "192.0.2.2"},
		{String("192.0.2.1, 192.0.2.2"), "want netip.Addr, have string 192.0.2.1, 192.0.2.2"},
		{String("fe80::1%eth0"), "want netip.Addr, have string fe80::1%eth0"},
		{String(""), "want netip.Addr, have string "},
		{Value{}, "want netip.Addr, have null"},
		{Int64(1), "want netip.Addr, have int64 1"},
	} {
		var dst struct {
			IP netip.Addr `spoe:"v,parse"`
		}
		have := ""
		if err := NewMessage("m", Arg{"v", tt.v}).Decode(&dst); err != nil {
			have = strings.TrimPrefix(err.Error(), "spoa: message m: argument v: ")
		} else {
			have = dst.IP.String()
		}
		if tt.want != have {
			t.Errorf("%v %v: want %s, have %s", tt.v.Kind(), tt.v, tt.want, have)
		}
	}
}

// More fields than arguments, in any order, and many.
func TestDecodeManyFields(t *testing.T) {
	var fields []reflect.StructField
	var args []Arg
	for i := range 100 {
		name := fmt.Sprintf("a%d", i)
		fields = append(fields, reflect.StructField{Name: "A" + name, Type: reflect.TypeFor[int](), Tag: reflect.StructTag(`spoe:"` + name + `"`)})
		args = append(args, Arg{name, Int(i)})
	}
	slices.Reverse(args)
	p := reflect.New(reflect.StructOf(fields))
	if err := NewMessage("m", args...).Decode(p.Interface()); err != nil {
		t.Fatal(err)
	}
	for i := range fields {
		if have := p.Elem().Field(i).Int(); int64(i) != have {
			t.Errorf("want %d, have %d", i, have)
		}
	}
	err := NewMessage("m", args[1:]...).Decode(p.Interface())
	if want := "spoa: message m: argument a99: want int, have nothing"; err == nil || err.Error() != want {
		t.Errorf("want %s, have %v", want, err)
	}
}

func TestDecodeErrors(t *testing.T) {
	type byName struct {
		V int `spoe:"ip_score"`
	}
	type byPosition struct {
		V int `spoe:"#1"`
	}
	type optional struct {
		V int `spoe:"v,optional"`
	}
	type unexported struct {
		v int `spoe:"v"`
	}
	type badOption struct {
		V int `spoe:"v,omitempty"`
	}
	type badPosition struct {
		V int `spoe:"#x"`
	}
	type farPosition struct {
		V int `spoe:"#256"`
	}
	type badType struct {
		V float64 `spoe:"v"`
	}
	type badElem struct {
		V []string `spoe:"v"`
	}
	type badParse struct {
		V string `spoe:"v,parse"`
	}
	type badPointer struct {
		V **int `spoe:"v"`
	}
	_ = unexported{}.v
	m := NewMessage("check", Arg{"v", String("x")})
	for _, tt := range []struct {
		dst  any
		want string
	}{
		{new(byName), "spoa: message check: argument ip_score: want int, have nothing"},
		{new(byPosition), "spoa: message check: argument #1: want int, have nothing"},
		// Optional is not a licence to be of the wrong kind.
		{new(optional), "spoa: message check: argument v: want int, have string x"},
		{new(unexported), "spoa: spoa.unexported.v: has a tag but is not exported"},
		{new(badOption), `spoa: spoa.badOption.V: tag "v,omitempty": unknown option omitempty`},
		{new(badParse), `spoa: spoa.badParse.V: tag "v,parse": option parse is for netip.Addr, not for string`},
		{new(badPointer), "spoa: spoa.badPointer.V: cannot decode into **int"},
		{new(badPosition), `spoa: spoa.badPosition.V: tag "#x": want a position from #0 to #255`},
		{new(farPosition), `spoa: spoa.farPosition.V: tag "#256": want a position from #0 to #255`},
		{new(badType), "spoa: spoa.badType.V: cannot decode into float64"},
		{new(badElem), "spoa: spoa.badElem.V: cannot decode into []string"},
		{byName{}, "spoa: message check: cannot decode into spoa.byName: want a pointer to a struct"},
		{(*byName)(nil), "spoa: message check: cannot decode into *spoa.byName: want a pointer to a struct"},
		{new(int), "spoa: message check: cannot decode into *int: want a pointer to a struct"},
		{nil, "spoa: message check: cannot decode into <nil>: want a pointer to a struct"},
	} {
		for range 2 { // found out, and from the cache
			if err := m.Decode(tt.dst); err == nil || err.Error() != tt.want {
				t.Errorf("%T: want %s, have %v", tt.dst, tt.want, err)
			}
		}
	}
}

// nineArguments is what Coraza's agent asks for.
type nineArguments struct {
	App     string     `spoe:"app"`
	SrcIP   netip.Addr `spoe:"src-ip"`
	SrcPort uint16     `spoe:"src-port"`
	DstIP   netip.Addr `spoe:"dst-ip"`
	DstPort uint16     `spoe:"dst-port"`
	Method  string     `spoe:"method"`
	ID      string     `spoe:"id,optional"`
	Path    string     `spoe:"path"`
	Version string     `spoe:"version"`
}

var nineMessage = NewMessage("coraza-req", Arg{"app", String("default")},
	Arg{"src-ip", Addr(netip.MustParseAddr("192.0.2.1"))}, Arg{"src-port", Int64(44321)},
	Arg{"dst-ip", Addr(netip.MustParseAddr("192.0.2.2"))}, Arg{"dst-port", Int64(443)},
	Arg{"method", String("GET")}, Arg{"id", String("")}, Arg{"path", String("/index.html")}, Arg{"version", String("1.1")})

func BenchmarkDecodeStruct(b *testing.B) {
	b.Run("four", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			var r request
			if err := requestMessage.Decode(&r); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("nine", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			var r nineArguments
			if err := nineMessage.Decode(&r); err != nil {
				b.Fatal(err)
			}
		}
	})
}
