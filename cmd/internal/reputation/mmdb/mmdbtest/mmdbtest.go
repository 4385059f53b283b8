// Package mmdbtest writes small MaxMind DB files for tests.
package mmdbtest

import (
	"bytes"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/maxmind/mmdbwriter"
	"github.com/maxmind/mmdbwriter/mmdbtype"
)

// Networks are records by prefix.
type Networks map[string]mmdbtype.DataType

// Country returns a record as GeoLite2-Country has it.
func Country(code string) mmdbtype.DataType {
	return mmdbtype.Map{"country": mmdbtype.Map{"iso_code": mmdbtype.String(code), "geoname_id": mmdbtype.Uint32(1)}}
}

// ASN returns a record as GeoLite2-ASN has it.
func ASN(number uint32, org string) mmdbtype.DataType {
	return mmdbtype.Map{
		"autonomous_system_number":       mmdbtype.Uint32(number),
		"autonomous_system_organization": mmdbtype.String(org),
	}
}

// Bytes returns a database.
func Bytes(t testing.TB, networks Networks) []byte {
	t.Helper()
	w, err := mmdbwriter.New(mmdbwriter.Options{DatabaseType: "Test", RecordSize: 24, IncludeReservedNetworks: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, prefix := range slices.Sorted(maps.Keys(networks)) {
		_, network, err := net.ParseCIDR(prefix)
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Insert(network, networks[prefix]); err != nil {
			t.Fatal(err)
		}
	}
	var b bytes.Buffer
	if _, err := w.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// Write writes a database to path, in the place of what is there.
func Write(t testing.TB, path string, networks Networks) {
	t.Helper()
	Replace(t, path, Bytes(t, networks))
}

// Replace writes b to path, in the place of what is there, all at once.
func Replace(t testing.TB, path string, b []byte) {
	t.Helper()
	next := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".next")
	if err := os.WriteFile(next, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(next, path); err != nil {
		t.Fatal(err)
	}
}
