// SPDX-License-Identifier: MPL-2.0

package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// keyring is where Debian's package debian-archive-keyring puts the keys that sign the archive.
const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// archive is the Debian archive as this machine reaches it, with a cache.
type archive struct {
	mirrors []string // base URIs in the order of the machine's own sources
	dir     string   // cache
	arch    string   // Debian's name: amd64, arm64
	note    func(format string, args ...any)

	mutex sync.Mutex
	read  map[string]func() (catalog, error) // by suite
}

// pkg is one stanza of a Packages index, with the mirror it was read from.
type pkg struct {
	name, version, filename, sha256 string
	depends                         []string // first alternative of each, names only
	mirror                          string
}

// mirrorsFromSources reads the base URIs of Debian archives from apt's own configuration, both formats.
func mirrorsFromSources(root string) ([]string, error) {
	var uris []string
	add := func(more ...string) {
		for _, uri := range more {
			uri = strings.TrimRight(uri, "/")
			if strings.HasPrefix(uri, "http") && !slices.Contains(uris, uri) {
				uris = append(uris, uri)
			}
		}
	}
	stanzas, err := filepath.Glob(filepath.Join(root, "sources.list.d", "*.sources"))
	if err != nil {
		return nil, err
	}
	lists, err := filepath.Glob(filepath.Join(root, "sources.list.d", "*.list"))
	if err != nil {
		return nil, err
	}
	ofStanza := func(line string) {
		if value, ok := strings.CutPrefix(line, "URIs:"); ok {
			add(strings.Fields(value)...)
		}
	}
	ofList := func(line string) {
		if fields := strings.Fields(line); len(fields) > 0 && fields[0] == "deb" {
			add(fields[1:]...) // what is no URI of an archive is passed over
		}
	}
	if err := errors.Join(eachLine(stanzas, ofStanza), eachLine(append([]string{filepath.Join(root, "sources.list")}, lists...), ofList)); err != nil {
		return nil, fmt.Errorf("read apt sources: %w", err)
	}
	if len(uris) == 0 {
		return nil, fmt.Errorf("find a Debian mirror: none in %s; name one in WEIR_DEBIAN_MIRROR", root)
	}
	return uris, nil
}

// eachLine hands over every line of the files that are there.
func eachLine(files []string, line func(string)) error {
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		for text := range strings.Lines(string(text)) {
			line(text)
		}
	}
	return nil
}

// catalog holds every version of every package that the indexes of a suite name.
type catalog map[string][]pkg

// newest returns the newest version of a package.
func (c catalog) newest(ctx context.Context, name string) (pkg, error) {
	versions := c[name]
	if len(versions) == 0 {
		return pkg{}, fmt.Errorf("find package %s: not in the index", name)
	}
	best := versions[0]
	for _, p := range versions[1:] {
		newer, err := versionNewer(ctx, p.version, best.version)
		if err != nil {
			return pkg{}, err
		}
		if newer {
			best = p
		}
	}
	return best, nil
}

// packages returns the packages of a suite and, where the archive has it, of its security suite. It
// reads each suite once.
func (a *archive) packages(ctx context.Context, suite string) (catalog, error) {
	a.mutex.Lock()
	once, ok := a.read[suite]
	if !ok {
		once = sync.OnceValues(func() (catalog, error) { return a.readSuite(ctx, suite) })
		if a.read == nil {
			a.read = map[string]func() (catalog, error){}
		}
		a.read[suite] = once
	}
	a.mutex.Unlock()
	return once()
}

func (a *archive) readSuite(ctx context.Context, suite string) (catalog, error) {
	found := catalog{}
	for _, s := range []string{suite, suite + "-security"} {
		mirror, index, err := a.index(ctx, s)
		if s != suite && errors.Is(err, errNoSuite) {
			continue // sid has none, and not every mirror carries security
		}
		if err != nil {
			return nil, fmt.Errorf("read index of %s: %w", s, err)
		}
		if err := readPackages(ctx, index, mirror, found); err != nil {
			return nil, fmt.Errorf("read index of %s: %w", s, err)
		}
	}
	return found, nil
}

var errNoSuite = errors.New("no mirror of this machine has the suite")

// index returns the path of the suite's verified Packages.xz and the mirror that has the suite.
// With no mirror in reach, what the cache holds is used.
func (a *archive) index(ctx context.Context, suite string) (mirror, path string, err error) {
	dir := filepath.Join(a.dir, "index", suite)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", "", err
	}
	release, origin := filepath.Join(dir, "Release"), filepath.Join(dir, "mirror")
	var offline error
	for _, m := range a.mirrors {
		err := fetch(ctx, m+"/dists/"+suite+"/InRelease", release+".signed", "")
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			offline = err
			continue
		}
		if err := a.verify(ctx, release+".signed", release); err != nil {
			return "", "", err
		}
		mirror = m
		if err := os.WriteFile(origin, []byte(m), 0o644); err != nil {
			return "", "", err
		}
		break
	}
	if mirror == "" {
		if offline == nil {
			return "", "", errNoSuite
		}
		cached, err := os.ReadFile(origin)
		if err != nil {
			return "", "", offline
		}
		a.note("no mirror in reach, using the cached index of %s: %v", suite, offline)
		mirror = string(cached)
	}
	name := "main/binary-" + a.arch + "/Packages.xz"
	sum, err := releaseSum(release, name)
	if err != nil {
		return "", "", err
	}
	path = filepath.Join(dir, a.arch+"-Packages.xz")
	byHash := mirror + "/dists/" + suite + "/" + filepath.Dir(name) + "/by-hash/SHA256/" + sum
	return mirror, path, fetchOnce(ctx, byHash, path, sum)
}

// verify checks the archive's signature of an InRelease file and writes the signed text to release.
// Where the machine has no keyring the checksums alone are left, and that is said.
func (a *archive) verify(ctx context.Context, signed, release string) error {
	if _, err := os.Stat(keyring); err != nil {
		a.note("no %s: the signature of the index is not checked", keyring)
		return os.Rename(signed, release)
	}
	part := release + ".part"
	if err := os.Remove(part); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if out, err := exec.CommandContext(ctx, "gpgv", "--keyring", keyring, "--output", part, signed).CombinedOutput(); err != nil {
		return fmt.Errorf("verify signature of %s: %w\n%s", signed, err, out)
	}
	return os.Rename(part, release)
}

// releaseSum finds the SHA256 of one file in a Release file.
func releaseSum(release, name string) (string, error) {
	text, err := os.ReadFile(release)
	if err != nil {
		return "", err
	}
	section := false
	for line := range strings.Lines(string(text)) {
		if !strings.HasPrefix(line, " ") {
			section = strings.HasPrefix(line, "SHA256:")
			continue
		}
		if f := strings.Fields(line); section && len(f) == 3 && f[2] == name {
			return f[0], nil
		}
	}
	return "", fmt.Errorf("find %s in %s: not listed", name, release)
}

// readPackages adds the stanzas of an index to found.
func readPackages(ctx context.Context, path, mirror string, found catalog) error {
	cmd := exec.CommandContext(ctx, "xz", "-dc", path)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("unpack index: %w", err)
	}
	if err := parsePackages(out, mirror, found); err != nil {
		return err
	}
	return cmd.Wait()
}

func parsePackages(r io.Reader, mirror string, found catalog) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 4<<20)
	p := pkg{mirror: mirror}
	end := func() {
		if p.name != "" {
			found[p.name] = append(found[p.name], p)
		}
		p = pkg{mirror: mirror}
	}
	for lines.Scan() {
		key, value, _ := strings.Cut(lines.Text(), ":")
		value = strings.TrimSpace(value)
		switch key {
		case "":
			end()
		case "Package":
			p.name = value
		case "Version":
			p.version = value
		case "Filename":
			p.filename = value
		case "SHA256":
			p.sha256 = value
		case "Depends", "Pre-Depends":
			p.depends = append(p.depends, packageNames(value)...)
		}
	}
	if err := lines.Err(); err != nil {
		return err
	}
	end()
	return nil
}

// packageNames reduces a dependency field to names: of alternatives the first, without version and architecture.
func packageNames(field string) []string {
	var names []string
	for part := range strings.SplitSeq(field, ",") {
		first, _, _ := strings.Cut(part, "|")
		if f := strings.Fields(first); len(f) > 0 {
			name, _, _ := strings.Cut(f[0], ":")
			names = append(names, name)
		}
	}
	return names
}

// versionNewer asks dpkg, which owns the rules.
func versionNewer(ctx context.Context, a, b string) (bool, error) {
	if a == b {
		return false, nil
	}
	err := exec.CommandContext(ctx, "dpkg", "--compare-versions", a, "gt", b).Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.ExitCode() == 1 {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("compare versions: %w", err)
	}
	return true, nil
}

// fetchOnce leaves a file that already has the sum.
func fetchOnce(ctx context.Context, url, path, sum string) error {
	if file, err := os.Open(path); err == nil {
		defer file.Close()
		hash := sha256.New()
		if _, err := io.Copy(hash, file); err != nil {
			return err
		}
		if hex.EncodeToString(hash.Sum(nil)) == sum {
			return nil
		}
	}
	return fetch(ctx, url, path, sum)
}

// fetch writes url to path, whole or not at all. An empty sum is not compared. A file the server
// does not have is os.ErrNotExist.
func fetch(ctx context.Context, url, path, sum string) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return fmt.Errorf("fetch %s: %w", url, err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return fmt.Errorf("fetch %s: %w", url, err)
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode == http.StatusNotFound:
		return fmt.Errorf("fetch %s: %w", url, os.ErrNotExist)
	case resp.StatusCode != http.StatusOK:
		return fmt.Errorf("fetch %s: %s", url, resp.Status)
	}
	part, err := os.CreateTemp(filepath.Dir(path), ".part-")
	if err != nil {
		return err
	}
	defer os.Remove(part.Name())
	defer part.Close()
	hash := sha256.New()
	if _, err := io.Copy(io.MultiWriter(part, hash), resp.Body); err != nil {
		return fmt.Errorf("fetch %s: %w", url, err)
	}
	if got := hex.EncodeToString(hash.Sum(nil)); sum != "" && got != sum {
		return fmt.Errorf("fetch %s: SHA256 is %s, the index says %s", url, got, sum)
	}
	return os.Rename(part.Name(), path)
}
