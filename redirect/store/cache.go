// SPDX-License-Identifier: MPL-2.0

package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// RecordCache remembers records as long as their files are the same: a record is never
// changed in place, each one is a file of its own. It is for who reads all of them time
// and again, and not safe for concurrent use.
type RecordCache struct{ seen map[string]cachedRecord }

type cachedRecord struct {
	inode    uint64
	size     int64
	modified syscall.Timespec
	record   *Record // nobody changes it; nil: there is none, or it cannot be read
	err      error
}

// sameFile reports whether a file is the one that was read.
func (c cachedRecord) sameFile(stat *syscall.Stat_t) bool {
	return c.inode == stat.Ino && c.size == stat.Size && c.modified == stat.Mtim
}

// ReadRecords is Paths.ReadRecords, but for what it read before. The records are shared
// with every other answer.
func (c *RecordCache) ReadRecords(p Paths) ([]*Record, error) {
	entries, err := os.ReadDir(p.Workloads())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list records: %w", err)
	}
	boot, err := BootID()
	if err != nil {
		return nil, err
	}
	var records []*Record
	var problems []error
	fresh := make(map[string]cachedRecord, len(entries))
	for _, entry := range entries {
		if !strings.HasSuffix(entry.Name(), ".json") {
			continue
		}
		path := filepath.Join(p.Workloads(), entry.Name())
		var stat syscall.Stat_t
		if syscall.Stat(path, &stat) != nil {
			continue // it went meanwhile
		}
		file, known := c.seen[entry.Name()]
		if !known || !file.sameFile(&stat) {
			file = cachedRecord{inode: stat.Ino, size: stat.Size, modified: stat.Mtim}
			file.record, file.err = readRecordFile(path, boot)
		}
		switch {
		case errors.Is(file.err, ErrUnknown):
		case file.err != nil:
			problems = append(problems, file.err)
			continue // it is tried again
		default:
			records = append(records, file.record)
		}
		fresh[entry.Name()] = file
	}
	c.seen = fresh
	return records, errors.Join(problems...)
}
