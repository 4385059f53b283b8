package judge

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/go-kit/log"
	"github.com/spoa-go/spoa"
	"github.com/spoa-go/spoa/cmd/internal/reputation/mmdb/mmdbtest"
)

// BenchmarkVerdict is a handler's call with sources of the size that they have in
// use: a million addresses on a list, 100,000 decisions of CrowdSec, 50,000
// networks with a country. The addresses that it judges are those of so many
// clients, or any, which no cache of the processor holds.
func BenchmarkVerdict(b *testing.B) {
	dir := b.TempDir()
	r := rand.New(rand.NewPCG(1, 2))
	file := func(name string, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			b.Fatal(err)
		}
		return path
	}
	lists := []string{"-reputation", file("block.txt", randomList(r, 1_000_000))}
	decisions := []string{"-crowdsec", randomDecisions(b, r, 100_000), "-crowdsec-key", file("key", "sesame")}
	places := filepath.Join(dir, "places.mmdb")
	networks := make(mmdbtest.Networks)
	for range 50_000 {
		networks[netip.PrefixFrom(randomAddr(r), 20).Masked().String()] = mmdbtest.Country(string([]byte{'A' + byte(r.IntN(26)), 'A' + byte(r.IntN(9))}))
	}
	mmdbtest.Write(b, places, networks)
	for _, test := range []struct {
		name string
		args []string
	}{
		{"lists", lists},
		{"decisions", slices.Concat(lists, decisions)},
		{"all", slices.Concat(lists, decisions, []string{"-mmdb", places, "-country", "ZZ=0"})},
	} {
		h := open(b, configure(b, test.args...), log.NewNopLogger()).Handler(0, uncounted{})
		for _, clients := range []int{1_000, 20_000, 200_000, 1 << 20} {
			messages := make([]*spoa.Message, clients)
			for i := range messages {
				messages[i] = spoa.NewMessage("check-client-ip", spoa.Arg{Value: spoa.Addr(randomAddr(r))})
			}
			b.Run(fmt.Sprintf("%s/%d", test.name, clients), func(b *testing.B) {
				for i := 0; b.Loop(); i++ {
					var a spoa.Actions
					if err := h(b.Context(), messages[i%clients], &a); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

func randomAddr(r *rand.Rand) netip.Addr {
	n := r.Uint32()
	return netip.AddrFrom4([4]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
}

func randomList(r *rand.Rand, n int) string {
	var text strings.Builder
	for range n {
		fmt.Fprintln(&text, randomAddr(r))
	}
	return text.String()
}

// randomDecisions returns the URL of a local API with so many decisions.
func randomDecisions(b *testing.B, r *rand.Rand, n int) string {
	b.Helper()
	type m = map[string]any
	all := make([]m, n)
	for i := range all {
		all[i] = m{"id": i, "scope": "Ip", "value": randomAddr(r).String(), "type": "ban", "scenario": "probing", "duration": "4h"}
	}
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		json.NewEncoder(w).Encode(m{"deleted": nil, "new": all})
	}))
	b.Cleanup(api.Close)
	return api.URL
}
