// Package lists holds block lists and allow lists of addresses, from files, pipes
// and URLs whose content may change at any time, and answers with the score of an
// address: 0 for the worst to 100 for those on no list.
//
// # What wins
//
// Within one list the longest prefix that contains an address wins, so that a
// list can refine itself. Between lists the lowest score wins, so that adding a
// list never lifts an address out of another. An allow list beats all. With
// 198.51.96.0/20 at 0 in one list and 198.51.100.7 at 60 in another, the latter
// has score 0; with both in one list, 60.
//
// # What is read
//
// Each address of a list has the list's score, which its flag names. The formats
// are found by content, and any of them may be compressed by gzip:
//
//   - a line each of: an address or prefix; a range a-b, with or without spaces; a
//     netmask, as a/m or a m; ip:port, [ip]:port; NAME:a-b of P2P; add of ipset
//     save; deny of nginx (allow, on an allow list); DShield's start, end and
//     length; ExitAddress of Tor
//   - CSV with titles, in the first line or in the comment before it, one of which
//     is a usual name for the address, such as ip or dst_ip
//   - JSON, in lines or in one document of any length: objects with an address in
//     a field of a usual name, such as cidr or ip_address, or strings in arrays
//
// Comments begin with #, ; or //, and a line of them also with !. What stands
// behind an address as a comment is the entry's note, which Explain returns.
// A line that is none of these is bad: it is counted and left out. With more than
// one bad line in a hundred the list is refused.
//
// # What a number behind an address is
//
// It is a score only where the list's flag (column=score) or a comment before the
// list's first entry ("# spoa: column=score") says so, since many lists have there
// a count or a confidence of which more is worse. The other kinds are badness, the
// contrary of a score; count>=N, which lists the addresses that have at least N;
// and ignore. For CSV and JSON, field=NAME says where the number is. The flag wins
// over the comment. If neither says what it is, the number is not used, each
// address has the list's score, and a warning says so and how to choose.
//
// # What is refused
//
// A list that is refused does not come into force; what it held before stays, and
// at the start Open fails. The reasons are:
//
//   - unreadable: the file or the URL cannot be read
//   - malformed: bad lines, a web page, UTF-16
//   - empty: it has not even a comment. One that has nothing but comments is a list
//     of nothing by intention: it comes into force, with a warning
//   - cut: it has fewer entries than its own header or trailer says (FireHOL's
//     "# Entries", Spamhaus' records, abuse.ch's "# END n entries"), Spamhaus'
//     metadata is missing, the JSON or the compressed data does not end, or the
//     last line has no end and is bad or is what is left of a prefix length
//   - wide: it has a prefix of /0 to /7, or of /0 to /15 in IPv6, that has addresses
//     of clients. FireHOL's 224.0.0.0/3 has none
//   - shrunk: it has less than half of the 10 or more entries that it had
//   - changing: it was written while it was read, five times in a row
//
// The flag's accept=cut, wide or shrunk takes such a list, with a warning.
//
// # URLs
//
// A list by URL is fetched at the start and then every Options.Refresh, up to a
// tenth later, but no more often than its "# Update Frequency" or the server's
// max-age asks for; in full only if it changed; again after a failure, with
// exponential pauses and within what Retry-After asks for. With Options.Cache the
// last good copy is kept, and a start uses it where it is younger than that
// interval, or where the server does not answer. Without, the copy is in memory
// while it is read. Certificates are verified, redirects lead no more than five
// times on and never from https to http, and no answer may be larger than 256 MiB
// or take longer than five minutes.
package lists
