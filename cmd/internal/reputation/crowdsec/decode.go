package crowdsec

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// decision is what the local API says of one.
type decision struct {
	ID        int64  `json:"id"`
	Scope     string `json:"scope"`
	Value     string `json:"value"`
	Type      string `json:"type"`
	Scenario  string `json:"scenario"`
	Duration  string `json:"duration"` // what is left, such as 3h59m58.9s; negative if it is over
	Simulated bool   `json:"simulated"`
}

// decode calls f for each decision of a stream's answer, an object with the
// arrays new and deleted, each of which may be null. Not more than one decision
// is held at a time.
func decode(r io.Reader, f func(deleted bool, d *decision)) error {
	dec := json.NewDecoder(r)
	if err := expect(dec, json.Delim('{')); err != nil {
		return err
	}
	arrays := 0
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return whole(err)
		}
		if key != "new" && key != "deleted" {
			var other json.RawMessage
			if err := dec.Decode(&other); err != nil {
				return whole(err)
			}
			continue
		}
		arrays++
		if err := decodeArray(dec, func(d *decision) { f(key == "deleted", d) }); err != nil {
			return fmt.Errorf("%s: %w", key, err)
		}
	}
	if err := expect(dec, json.Delim('}')); err != nil {
		return err
	}
	if arrays != 2 {
		return errors.New("want a stream of decisions with new and deleted ones, have something else")
	}
	return nil
}

func decodeArray(dec *json.Decoder, f func(*decision)) error {
	t, err := dec.Token()
	switch {
	case err != nil:
		return whole(err)
	case t == nil: // null
		return nil
	case t != json.Delim('['):
		return fmt.Errorf("want an array, have %v", t)
	}
	for dec.More() {
		var d decision
		if err := dec.Decode(&d); err != nil {
			return whole(err)
		}
		f(&d)
	}
	return expect(dec, json.Delim(']'))
}

func expect(dec *json.Decoder, want json.Delim) error {
	t, err := dec.Token()
	if err != nil {
		return whole(err)
	}
	if t != want {
		return fmt.Errorf("want %v, have %.60q", want, fmt.Sprint(t))
	}
	return nil
}

// whole makes the end of a cut answer an error that says so.
func whole(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
