// Package liststest makes block lists for tests, in the shape and size of those
// that are published, with invented content.
package liststest

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
)

// Feed is a list.
type Feed struct {
	Name    string // of its file; no two feeds have one
	Data    []byte
	Options string     // of its flag, such as ",column=count>=3"
	Entries int        // prefixes that come into force
	Listed  netip.Addr // on this feed and no other
	Note    string     // what the feed says of it
	Worst   bool       // its score is 0, by the feed's own number
}

// Feeds returns one of each. Each has the networks of a first octet for itself.
func Feeds() []Feed {
	return []Feed{
		firehol(20, 4500), dropText(21, 1200), dropJSON(22, 1500), ipsum(23, 150_000), dshield(24, 20), tor(25, 1300),
		feodoCSV(26, 500), feodoJSON(27, 500), sslbl(28, 9000), abuseIPDB(29, 10_000),
	}
}

// networks returns n different prefixes of that length below a first octet, in
// order.
func networks(octet byte, n, bits int) []netip.Prefix {
	r := rand.New(rand.NewPCG(uint64(octet), uint64(n)))
	seen := make(map[netip.Prefix]bool, n)
	all := make([]netip.Prefix, 0, n)
	for len(all) < n {
		v := r.Uint32()
		p, _ := netip.AddrFrom4([4]byte{octet, byte(v >> 16), byte(v >> 8), byte(v)}).Prefix(bits)
		if !seen[p] {
			seen[p] = true
			all = append(all, p)
		}
	}
	slices.SortFunc(all, netip.Prefix.Compare)
	return all
}

// last returns the last address of an IPv4 prefix.
func last(p netip.Prefix) netip.Addr {
	b := p.Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	return netip.AddrFrom4(b)
}

func firehol(octet byte, n int) Feed {
	var b bytes.Buffer
	bogons := []string{"0.0.0.0/8", "10.0.0.0/8", "127.0.0.0/8", "224.0.0.0/3"}
	fmt.Fprintf(&b, "#\n# firehol_level1\n#\n# ipv4 hash:net ipset\n#\n# A firewall blacklist composed from IP lists, providing\n"+
		"# maximum protection with minimum false positives.\n#\n# Maintainer      : FireHOL\n# Category        : attacks\n# Version         : 704\n#\n"+
		"# This File Date  : Mon Jan  1 00:00:00 UTC 2024\n# Update Frequency: 1 min\n# Aggregation     : none\n"+
		"# Entries         : %d subnets, 614264832 unique IPs\n#\n", n+len(bogons))
	for _, s := range bogons {
		fmt.Fprintln(&b, s)
	}
	all := networks(octet, n, 24)
	for i, p := range all {
		if i%5 == 0 {
			fmt.Fprintln(&b, p.Addr()) // a netset has both
		} else {
			fmt.Fprintln(&b, p)
		}
	}
	return Feed{Name: "firehol_level1.netset", Data: b.Bytes(), Entries: n + len(bogons), Listed: last(all[1])}
}

func dropText(octet byte, n int) Feed {
	var b bytes.Buffer
	fmt.Fprint(&b, "; Spamhaus DROP List 2024/01/01 - (c) 2024 The Spamhaus Project SLU\n; https://www.spamhaus.org/drop/drop.txt\n"+
		"; Last-Modified: Mon,  1 Jan 2024 00:00:00 GMT\n; Expires: Mon,  1 Jan 2024 01:00:00 GMT\n")
	all := networks(octet, n, 22)
	for i, p := range all {
		fmt.Fprintf(&b, "%v ; SBL%d\n", p, 200000+i)
	}
	return Feed{Name: "drop.txt", Data: b.Bytes(), Entries: n, Listed: last(all[7]), Note: "SBL200007"}
}

func dropJSON(octet byte, n int) Feed {
	var b bytes.Buffer
	all := networks(octet, n, 22)
	for i, p := range all {
		fmt.Fprintf(&b, `{"cidr":"%v","sblid":"SBL%d","rir":"apnic"}`+"\n", p, 300000+i)
	}
	fmt.Fprintf(&b, `{"type":"metadata","timestamp":1704067200,"size":%d,"records":%d,"copyright":"(c) 2024 The Spamhaus Project SLU",`+
		`"terms":"https://www.spamhaus.org/drop/terms/"}`+"\n", b.Len(), n)
	return Feed{Name: "drop_v4.json", Data: b.Bytes(), Entries: n, Listed: last(all[7]), Note: "SBL300007"}
}

func ipsum(octet byte, n int) Feed {
	var b bytes.Buffer
	fmt.Fprint(&b, "# IPsum Threat Intelligence Feed\n# (https://github.com/stamparm/ipsum)\n#\n# Last update: Mon, 01 Jan 2024 03:00:00 +0100\n#\n"+
		"# IP\tnumber of (black)lists\n#\n")
	entries, all := 0, networks(octet, n, 32)
	for i, p := range all {
		count := 1 + 10*(n-i)/(n+1) // the worst come first
		if count >= 3 {
			entries++
		}
		fmt.Fprintf(&b, "%v\t%d\n", p.Addr(), count)
	}
	return Feed{Name: "ipsum.txt", Data: b.Bytes(), Options: ",column=count>=3", Entries: entries, Listed: all[7].Addr()}
}

func dshield(octet byte, n int) Feed {
	var b bytes.Buffer
	fmt.Fprint(&b, "#\n#   DShield.org Recommended Block List\n#   (c) 2024 DShield.org\n#   some rights reserved. Details http://creativecommons.org/\n#\n"+
		"#    updated: Mon Jan  1 00:00:00 2024 UTC\n#\n#   Columns (tab delimited):\n#     (1) start of netblock\n#     (2) end of netblock\n"+
		"#     (3) subnet ('/24' for class C)\n#     (4) number of targets scanned\n#     (5) name of Network\n#     (6) Country\n#     (7) contact email address\n#\n"+
		"Start\tEnd\tNetmask\tAttacks\tName\tCountry\temail\n")
	all := networks(octet, n, 24)
	for i, p := range all {
		fmt.Fprintf(&b, "%v\t%v\t24\t%d\tEXAMPLE-%d\tZZ\tabuse@example.net\n", p.Addr(), last(p), 3000-i, i)
	}
	return Feed{Name: "block.txt", Data: b.Bytes(), Entries: n, Listed: last(all[7]), Note: "EXAMPLE-7"}
}

func tor(octet byte, n int) Feed {
	var b bytes.Buffer
	all := networks(octet, n, 32)
	for i, p := range all {
		fmt.Fprintf(&b, "ExitNode %040X\nPublished 2024-01-01 00:00:00\nLastStatus 2024-01-01 01:00:00\nExitAddress %v 2024-01-01 01:10:00\n", i, p.Addr())
	}
	return Feed{Name: "tor.exit-addresses", Data: b.Bytes(), Entries: n, Listed: all[7].Addr()}
}

const rule = "################################################################\n"

func feodoCSV(octet byte, n int) Feed {
	var b bytes.Buffer
	fmt.Fprint(&b, rule+"# abuse.ch Feodo Tracker Botnet C2 IP Blocklist (CSV)          #\n# Last updated: 2024-01-01 00:00:00 UTC                        #\n"+rule)
	fmt.Fprintln(&b, `"first_seen_utc","dst_ip","dst_port","c2_status","last_online","malware"`)
	all := networks(octet, n, 32)
	for i, p := range all {
		fmt.Fprintf(&b, `"2024-01-01 00:00:%02d","%v","%d","offline","2024-01-01","Malware %d"`+"\n", i%60, p.Addr(), 1024+i, i%9)
	}
	fmt.Fprintf(&b, "# END %d entries\n", n)
	return Feed{Name: "feodo.csv", Data: b.Bytes(), Entries: n, Listed: all[7].Addr(), Note: "Malware 7"}
}

func feodoJSON(octet byte, n int) Feed {
	type object struct {
		IP       string  `json:"ip_address"`
		Port     int     `json:"port"`
		Status   string  `json:"status"`
		Hostname *string `json:"hostname"`
		ASN      int     `json:"as_number"`
		ASName   string  `json:"as_name"`
		Country  string  `json:"country"`
		First    string  `json:"first_seen"`
		Malware  string  `json:"malware"`
	}
	var objects []object
	all := networks(octet, n, 32)
	for i, p := range all {
		objects = append(objects, object{p.Addr().String(), 1024 + i, "offline", nil, 64496, "EXAMPLE", "ZZ", "2024-01-01 00:00:00", fmt.Sprint("Malware ", i%9)})
	}
	data, _ := json.MarshalIndent(objects, "", "    ")
	return Feed{Name: "feodo.json", Data: data, Entries: n, Listed: all[7].Addr(), Note: "Malware 7"}
}

func sslbl(octet byte, n int) Feed {
	var b bytes.Buffer
	fmt.Fprint(&b, rule+"# abuse.ch SSLBL Botnet C2 IP Blacklist (CSV)                  #\n"+rule+"#\n# Firstseen,DstIP,DstPort\n")
	w := csv.NewWriter(&b)
	w.UseCRLF = true
	all := networks(octet, n, 32)
	for i, p := range all {
		_ = w.Write([]string{"2024-01-01 00:00:00", p.Addr().String(), fmt.Sprint(1024 + i)}) // into memory
	}
	w.Flush()
	return Feed{Name: "sslipblacklist.csv", Data: b.Bytes(), Entries: n, Listed: all[7].Addr()}
}

func abuseIPDB(octet byte, n int) Feed {
	type object struct {
		IP         string `json:"ipAddress"`
		Country    string `json:"countryCode"`
		Confidence int    `json:"abuseConfidenceScore"`
		Last       string `json:"lastReportedAt"`
	}
	var v struct {
		Meta struct {
			Generated string `json:"generatedAt"`
		} `json:"meta"`
		Data []object `json:"data"`
	}
	v.Meta.Generated = "2024-01-01T00:00:00+00:00"
	all := networks(octet, n, 32)
	for _, p := range all {
		v.Data = append(v.Data, object{p.Addr().String(), "ZZ", 100, "2024-01-01T00:00:00+00:00"})
	}
	data, _ := json.Marshal(v)
	return Feed{Name: "abuseipdb.json", Data: data, Options: ",column=badness,field=abuseConfidenceScore", Entries: n, Listed: all[7].Addr(), Worst: true}
}
