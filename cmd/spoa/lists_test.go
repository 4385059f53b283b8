//go:build unix

package main

import (
	"path/filepath"
	"strings"
	"testing"
)

// The case of a list whose second column is no score of ours: nothing of it is
// taken for one, and -check says how to choose.
func TestCheckWarns(t *testing.T) {
	list := filepath.Join(t.TempDir(), "ipsum.txt")
	writeFile(t, list, "198.51.100.7\t10\n203.0.113.9\t3\n192.0.2.4\t1\n")
	for _, tc := range []struct {
		option string
		want   []string
		lines  int
	}{
		{"", []string{"lists: 1, entries: 3, bad lines: 0", "warning: " + list, "(3, the first in line 1) are not used", "column=KIND"}, 2},
		{",column=count>=3", []string{"entries: 2"}, 1},
		{",column=score", []string{"entries: 3"}, 1},
		{",column=ignore", []string{"entries: 3"}, 1},
	} {
		exit, stdout, stderr := cli("-check", "-reputation", list+tc.option)
		for _, want := range tc.want {
			if exit != 0 || stderr != "" || !strings.Contains(stdout, want) || strings.Count(stdout, "\n") != tc.lines {
				t.Errorf("%q: want %q in %d lines, have %d, %q, %q", tc.option, want, tc.lines, exit, stdout, stderr)
			}
		}
	}
}

func TestLookupFlag(t *testing.T) {
	dir := t.TempDir()
	drop, own := filepath.Join(dir, "drop.txt"), filepath.Join(dir, "own")
	writeFile(t, drop, "198.51.96.0/20 ; SBL1\n")
	writeFile(t, own, "198.51.100.7\n")
	for _, tc := range []struct {
		addr string
		want []string
		exit int
	}{
		{"198.51.97.1", []string{"198.51.97.1: listed, score 7, by list drop\n", "*  drop  198.51.96.0/20  7 ", "SBL1"}, 0},
		{"198.51.100.7", []string{"198.51.100.7: allowed, score 100, by list own\n", "   drop  198.51.96.0/20 ", "*  own   198.51.100.7/32  allow "}, 0},
		{"8.8.8.8", []string{"8.8.8.8: unlisted, score 100\n"}, 0},
		{"8.8.8", []string{"-lookup", "want an address"}, 2},
	} {
		exit, stdout, stderr := cli("-lookup", tc.addr, "-reputation", drop+"=7", "-allow", own)
		for _, want := range tc.want {
			if exit != tc.exit || !strings.Contains(stdout+stderr, want) {
				t.Errorf("%s: want %d and %q, have %d, %s%s", tc.addr, tc.exit, want, exit, stdout, stderr)
			}
		}
	}
	if exit, _, stderr := cli("-lookup", "8.8.8.8"); exit != 1 || !strings.Contains(stderr, "want lists") {
		t.Errorf("without lists: want an error, have %d, %s", exit, stderr)
	}
	if exit, _, stderr := cli("-refresh", "1s"); exit != 2 || !strings.Contains(stderr, "at least 1m") {
		t.Errorf("-refresh 1s: want an error, have %d, %s", exit, stderr)
	}
}
