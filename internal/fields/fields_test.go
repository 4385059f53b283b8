package fields

import (
	"net/netip"
	"reflect"
	"strings"
	"testing"
)

// value stands for the type of fields that take any value.
type value struct{ _ int }

func planOf(t *testing.T, s any) *Plan {
	t.Helper()
	return NewPlans(reflect.TypeFor[value]()).Of(reflect.TypeOf(s))
}

// Fields are in the order in which arguments are looked for: by name, then by
// position.
func TestPlan(t *testing.T) {
	type text string
	type s struct {
		Second  uint16      `spoe:"#1"`
		A       text        `spoe:"a"`
		Other   int         // without a tag
		B       *int8       `spoe:"b,optional"`
		Again   []byte      `spoe:"a,optional"`
		First   value       `spoe:"#0"`
		Address *netip.Addr `spoe:"ip,parse,optional"`
	}
	p := planOf(t, s{})
	if p.Err != nil {
		t.Fatal(p.Err)
	}
	typ := reflect.TypeFor[s]()
	at := func(name string) uintptr { f, _ := typ.FieldByName(name); return f.Offset }
	want := []Field{
		{Name: "a", Pos: -1, Elem: reflect.TypeFor[text](), Kind: KindString, Offset: at("A")},
		{Name: "a", Pos: -1, Optional: true, Elem: reflect.TypeFor[[]byte](), Kind: KindBytes, Offset: at("Again")},
		{Name: "b", Pos: -1, Optional: true, Pointer: true, Elem: reflect.TypeFor[int8](), Kind: KindInt8, Offset: at("B")},
		{Name: "ip", Pos: -1, Optional: true, Parse: true, Pointer: true, Elem: reflect.TypeFor[netip.Addr](), Kind: KindAddr, Offset: at("Address")},
		{Name: "#0", Pos: 0, Elem: reflect.TypeFor[value](), Kind: KindValue, Offset: at("First")},
		{Name: "#1", Pos: 1, Elem: reflect.TypeFor[uint16](), Kind: KindUint16, Offset: at("Second")},
	}
	if !reflect.DeepEqual(want, p.Fields) {
		t.Errorf("want %+v\nhave %+v", want, p.Fields)
	}
	if p.Named != 4 || !reflect.DeepEqual(p.ByName, map[string]int{"a": 0, "b": 2, "ip": 3}) {
		t.Errorf("want 4 by name, have %d: %v", p.Named, p.ByName)
	}
}

func TestKinds(t *testing.T) {
	ps := NewPlans(reflect.TypeFor[value]())
	for _, tt := range []struct {
		v    any
		want Kind
	}{
		{false, KindBool}, {int8(0), KindInt8}, {int16(0), KindInt16}, {int32(0), KindInt32}, {int64(0), KindInt64},
		{uint8(0), KindUint8}, {uint16(0), KindUint16}, {uint32(0), KindUint32}, {uint64(0), KindUint64},
		{"", KindString}, {[]byte(nil), KindBytes}, {netip.Addr{}, KindAddr}, {value{}, KindValue},
		{1.5, 0}, {[]int(nil), 0}, {struct{}{}, 0}, {map[string]int(nil), 0}, {[4]byte{}, 0},
	} {
		if have := ps.kindOf(reflect.TypeOf(tt.v)); tt.want != have {
			t.Errorf("%T: want kind %d, have %d", tt.v, tt.want, have)
		}
	}
}

func TestBadTags(t *testing.T) {
	for _, tt := range []struct {
		s    any
		want string
	}{
		{struct {
			A int `spoe:"#256"`
		}{}, "want a position from #0 to #255"},
		{struct {
			A int `spoe:"#x"`
		}{}, "want a position from #0 to #255"},
		{struct {
			A int `spoe:"a,omitempty"`
		}{}, "unknown option omitempty"},
		{struct {
			a int `spoe:"a"`
		}{}, "has a tag but is not exported"},
		{struct {
			A float64 `spoe:"a"`
		}{}, "cannot decode into float64"},
		{struct {
			A *value `spoe:"a"`
		}{}, "cannot decode into *fields.value"},
		{struct {
			A string `spoe:"a,parse"`
		}{}, "option parse is for netip.Addr, not for string"},
	} {
		if err := planOf(t, tt.s).Err; err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("want an error with %q, have %v", tt.want, err)
		}
	}
}

// A type is looked at once.
func TestPlanIsKept(t *testing.T) {
	ps := NewPlans(reflect.TypeFor[value]())
	type s struct {
		A int `spoe:"a"`
	}
	if a, b := ps.Of(reflect.TypeFor[s]()), ps.Of(reflect.TypeFor[s]()); a != b {
		t.Error("want the same plan")
	}
}
