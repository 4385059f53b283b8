package lists

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/cenkalti/backoff/v5"
)

// cache keeps the last good copy of each URL in a directory: a line of JSON with
// what the server said of it, and the list. The time of the file is that of the
// server's last answer.
type cache struct{ dir string } // empty: none

// header is the first line of a cached list.
type header struct {
	ETag         string        `json:"etag,omitempty"`
	LastModified string        `json:"lastModified,omitempty"`
	MaxAge       time.Duration `json:"maxAge,omitempty"`
	Status       int           `json:"status"`
}

// spool is a list that was fetched, in a file if there is a cache, else in memory.
type spool struct {
	file  *os.File
	begin int64 // of the list in file
	data  []byte
	size  int64
	final string // the name of file when the list has come into force
}

// kept is a list from the cache.
type kept struct {
	spool
	answer  answer
	fetched time.Time
}

func (c cache) path(url string) string {
	sum := sha256.Sum256([]byte(url))
	return filepath.Join(c.dir, fmt.Sprintf("%x.list", sum[:16]))
}

// spool reads what a server sends to its end. What goes wrong with the disk goes
// wrong again, and is an error for good.
func (c cache) spool(url string, a answer, body io.Reader) (s spool, err error) {
	if c.dir == "" {
		s.data, err = io.ReadAll(body)
		s.size = int64(len(s.data))
		return s, err
	}
	s.final = c.path(url)
	if s.file, err = c.create(); err != nil {
		return spool{}, backoff.Permanent(err)
	}
	head, err := json.Marshal(header{a.etag, a.lastModified, a.maxAge, a.status})
	if err == nil {
		_, err = s.file.Write(append(head, '\n'))
		s.begin = int64(len(head) + 1)
	}
	if err != nil {
		s.discard()
		return spool{}, backoff.Permanent(err)
	}
	s.size, err = io.Copy(s.file, body)
	var disk *fs.PathError
	if err != nil {
		s.discard()
		if errors.As(err, &disk) {
			err = backoff.Permanent(err)
		}
		return spool{}, err
	}
	return s, nil
}

// sweep removes what a process that was killed left behind.
func (c cache) sweep() {
	if c.dir == "" {
		return
	}
	left, _ := filepath.Glob(filepath.Join(escapeGlob(c.dir), ".fetched-*"))
	for _, name := range left {
		if fi, err := os.Stat(name); err == nil && time.Since(fi.ModTime()) > time.Hour {
			os.Remove(name)
		}
	}
}

func (c cache) create() (*os.File, error) {
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		return nil, err
	}
	return os.CreateTemp(c.dir, ".fetched-*")
}

// open returns the last good copy of a URL. Its fetched is zero if there is none.
func (c cache) open(url string) (k kept, err error) {
	if c.dir == "" {
		return k, fs.ErrNotExist
	}
	f, err := os.Open(c.path(url))
	if err != nil {
		return k, err
	}
	fi, err := f.Stat()
	var line []byte
	if err == nil {
		line, err = bufio.NewReader(f).ReadBytes('\n')
	}
	var h header
	if err == nil {
		err = json.Unmarshal(line, &h)
	}
	if err != nil {
		f.Close()
		return k, err
	}
	k.spool = spool{file: f, begin: int64(len(line)), size: fi.Size() - int64(len(line))}
	k.answer = answer{etag: h.ETag, lastModified: h.LastModified, maxAge: h.MaxAge, status: h.Status}
	k.fetched = fi.ModTime()
	return k, nil
}

// touch notes that the copy of a URL is still good.
func (c cache) touch(url string, now time.Time) {
	if c.dir != "" {
		_ = os.Chtimes(c.path(url), now, now) // without which the next start fetches it
	}
}

// reader returns the list from its begin.
func (s *spool) reader() io.Reader {
	if s.file == nil {
		return bytes.NewReader(s.data)
	}
	return io.NewSectionReader(s.file, s.begin, s.size)
}

func (s *spool) close() {
	if s.file != nil {
		s.file.Close()
	}
}

// discard removes a list that does not come into force.
func (s *spool) discard() {
	if s.file != nil {
		s.file.Close()
		os.Remove(s.file.Name())
	}
}

// keep makes a list the last good copy of its URL.
func (s *spool) keep() error {
	if s.file == nil {
		return nil
	}
	err := errors.Join(s.file.Sync(), s.file.Close())
	if err == nil {
		err = os.Rename(s.file.Name(), s.final)
	}
	if err != nil {
		os.Remove(s.file.Name())
	}
	return err
}
