// Package fields reads the tags of a struct's fields, which say what argument of
// a message goes into each.
package fields

import (
	"errors"
	"fmt"
	"math/bits"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// Field is a field that an argument is stored in.
type Field struct {
	Name     string
	Pos      int // of the argument; -1: by name
	Optional bool
	Parse    bool // an address may come as a text
	Pointer  bool
	Elem     reflect.Type // of the field, or of what it points to
	Kind     Kind         // of Elem
	Offset   uintptr
}

// Plan holds the fields of a struct type: first those by name, the ones of the
// same name side by side, then those by position in its order.
type Plan struct {
	Fields []Field
	Named  int            // how many are by name
	ByName map[string]int // the first field of each name
	Err    error          // what is wrong with a tag
}

// Plans makes a Plan once for each type. Several goroutines may use it at once.
type Plans struct {
	value reflect.Type
	plans sync.Map // of *Plan by reflect.Type
}

// NewPlans returns Plans in which value is the type of fields of KindValue.
func NewPlans(value reflect.Type) *Plans { return &Plans{value: value} }

// Of returns the Plan of the struct type t.
func (ps *Plans) Of(t reflect.Type) *Plan {
	if p, ok := ps.plans.Load(t); ok {
		return p.(*Plan)
	}
	p, _ := ps.plans.LoadOrStore(t, ps.newPlan(t))
	return p.(*Plan)
}

func (ps *Plans) newPlan(t reflect.Type) *Plan {
	p := &Plan{ByName: make(map[string]int)}
	var named, byPos []Field
	for i := range t.NumField() {
		sf := t.Field(i)
		tag, ok := sf.Tag.Lookup("spoe")
		if !ok {
			continue
		}
		f, err := ps.newField(sf, tag)
		if err != nil {
			return &Plan{Err: fmt.Errorf("spoa: %v.%s: %w", t, sf.Name, err)}
		}
		if f.Pos >= 0 {
			byPos = append(byPos, f)
		} else {
			named = append(named, f)
		}
	}
	for _, f := range named {
		if _, ok := p.ByName[f.Name]; ok {
			continue
		}
		p.ByName[f.Name] = len(p.Fields)
		for _, g := range named {
			if g.Name == f.Name {
				p.Fields = append(p.Fields, g)
			}
		}
	}
	p.Named = len(p.Fields)
	slices.SortStableFunc(byPos, func(a, b Field) int { return a.Pos - b.Pos })
	p.Fields = append(p.Fields, byPos...)
	return p
}

func (ps *Plans) newField(sf reflect.StructField, tag string) (Field, error) {
	name, opts, _ := strings.Cut(tag, ",")
	f := Field{Name: name, Pos: -1, Elem: sf.Type, Offset: sf.Offset}
	if digits, ok := strings.CutPrefix(name, "#"); ok {
		pos, err := strconv.ParseUint(digits, 10, 8)
		if err != nil {
			return f, fmt.Errorf("tag %q: want a position from #0 to #255", tag)
		}
		f.Pos = int(pos)
	}
	for opts != "" {
		var o string
		switch o, opts, _ = strings.Cut(opts, ","); o {
		case "optional":
			f.Optional = true
		case "parse":
			f.Parse = true
		default:
			return f, fmt.Errorf("tag %q: unknown option %s", tag, o)
		}
	}
	if !sf.IsExported() {
		return f, errors.New("has a tag but is not exported")
	}
	if f.Pointer = sf.Type.Kind() == reflect.Pointer; f.Pointer {
		f.Elem = sf.Type.Elem()
	}
	f.Kind = ps.kindOf(f.Elem)
	switch {
	case f.Kind == 0, f.Pointer && f.Kind == KindValue:
		return f, fmt.Errorf("cannot decode into %v", sf.Type)
	case f.Parse && f.Kind != KindAddr:
		return f, fmt.Errorf("tag %q: option parse is for netip.Addr, not for %v", tag, sf.Type)
	}
	return f, nil
}

// Kind says how a value is stored.
type Kind uint8

// The kinds. Int and uint types of the same size are stored alike.
const (
	KindBool Kind = iota + 1
	KindInt8
	KindInt16
	KindInt32
	KindInt64
	KindUint8
	KindUint16
	KindUint32
	KindUint64
	KindString
	KindBytes
	KindAddr
	KindValue
)

// kindOf returns 0 for a type that nothing can be decoded into.
func (ps *Plans) kindOf(t reflect.Type) Kind {
	switch k := t.Kind(); {
	case t == reflect.TypeFor[netip.Addr]():
		return KindAddr
	case t == ps.value:
		return KindValue
	case k == reflect.Bool:
		return KindBool
	case k == reflect.String:
		return KindString
	case k == reflect.Slice && t.Elem().Kind() == reflect.Uint8:
		return KindBytes
	case k >= reflect.Int && k <= reflect.Int64:
		return KindInt8 + Kind(bits.TrailingZeros(uint(t.Size())))
	case k >= reflect.Uint && k <= reflect.Uintptr:
		return KindUint8 + Kind(bits.TrailingZeros(uint(t.Size())))
	}
	return 0
}
