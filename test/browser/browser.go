// SPDX-License-Identifier: MPL-2.0

// Package browser runs a real Chromium without a window, for tests of pages.
package browser

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/input"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
	"github.com/weirmesh/weir/test"
)

// Tab is a page that is open in a browser of the test's own.
type Tab struct {
	t   testing.TB
	ctx context.Context
}

// Open starts a browser and opens a page in it. Whatever the browser complains of
// fails the test: a script that throws, and all that the page's policy forbids. Clocks
// on the page show UTC.
func Open(t testing.TB, url string, dark bool) *Tab {
	t.Helper()
	test.Need(t, test.Tool("chromium"))
	const width, height, start = 1440, 900, time.Minute
	options := append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.ExecPath("chromium"), chromedp.NoSandbox, // tests run as root
		chromedp.UserDataDir(t.TempDir()), chromedp.WindowSize(width, height), chromedp.WSURLReadTimeout(start))
	ctx, stop := chromedp.NewExecAllocator(context.Background(), options...)
	ctx, cancel := chromedp.NewContext(ctx)
	t.Cleanup(func() {
		if err := chromedp.Cancel(ctx); err != nil {
			t.Errorf("end the browser: %v", err)
		}
		cancel()
		stop()
	})
	tab := &Tab{t: t, ctx: ctx}
	tab.Do() // the browser starts, and lives as long as ctx
	err := chromedp.Listen(ctx, func(event any) {
		switch event := event.(type) {
		case *runtime.EventExceptionThrown:
			t.Errorf("the page's script threw: %s", event.ExceptionDetails.Text)
		case *log.EventEntryAdded:
			if event.Entry.Source == log.EntrySourceSecurity {
				t.Errorf("the browser refused: %s", event.Entry.Text)
			}
		}
	})
	if err != nil {
		t.Fatalf("browser: %v", err)
	}
	scheme := "light"
	if dark {
		scheme = "dark"
	}
	tab.Do(chromedp.Func(func(ctx context.Context, target *chromedp.Target) error {
		if _, err := cdp.Call(ctx, target, log.Enable, cdp.Empty{}); err != nil {
			return err
		}
		if _, err := cdp.Call(ctx, target, emulation.SetTimezoneOverride, emulation.SetTimezoneOverrideParams{TimezoneID: "UTC"}); err != nil {
			return err
		}
		_, err := cdp.Call(ctx, target, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{
			{Name: "prefers-color-scheme", Value: scheme}, {Name: "prefers-reduced-motion", Value: "reduce"},
		}})
		return err
	}), chromedp.EmulateViewport(width, height), chromedp.Navigate(url))
	return tab
}

// Do has the browser do something.
func (b *Tab) Do(actions ...chromedp.Action[chromedp.Void]) {
	b.t.Helper()
	const timeout = time.Minute
	done := make(chan error, 1)
	go func() { done <- chromedp.Do(b.ctx, actions...) }()
	select {
	case err := <-done:
		if err != nil {
			b.t.Fatalf("browser: %v", err)
		}
	case <-time.After(timeout):
		b.t.Fatalf("browser: no answer in %s", timeout)
	}
}

// Keys presses keys, of which kb has those that are no letters. As in a browser with a
// window, a key that the page takes for itself writes nothing, which is not so with the
// library's own action: that sends the letter as an event of its own.
func (b *Tab) Keys(keys string) {
	b.t.Helper()
	b.Do(chromedp.Func(func(ctx context.Context, target *chromedp.Target) error {
		for _, key := range keys {
			events := kb.Encode(key)
			for _, event := range events {
				if event.Type == kb.KeyChar {
					events[0].Type, events[0].Text, events[0].UnmodifiedText = kb.KeyDown, event.Text, event.UnmodifiedText
				}
			}
			for _, event := range events {
				if event.Type == kb.KeyChar {
					continue
				}
				if _, err := cdp.Call(ctx, target, input.DispatchKeyEvent, *event); err != nil {
					return err
				}
			}
		}
		return nil
	}))
}

// Until waits until an expression of JavaScript is true.
func (b *Tab) Until(expression string) {
	b.t.Helper()
	test.Eventually(b.t, func() error {
		is, err := chromedp.Run(b.ctx, chromedp.Evaluate[bool](expression))
		if err == nil && !is {
			err = fmt.Errorf("it is false; the page reads:\n%s", b.Text("body"))
		}
		return err
	}, expression)
}

// Text is what a reader sees of the element.
func (b *Tab) Text(selector string) string {
	b.t.Helper()
	text, err := chromedp.Run(b.ctx, chromedp.Evaluate[string](fmt.Sprintf("document.querySelector(%q)?.innerText ?? 'nothing is there'", selector)))
	if err != nil {
		b.t.Fatalf("browser: %v", err)
	}
	return text
}

// Screenshot writes what is to be seen into a file.
func (b *Tab) Screenshot(path string) {
	b.t.Helper()
	picture, err := chromedp.Run(b.ctx, chromedp.CaptureScreenshot())
	if err != nil {
		b.t.Fatalf("browser: %v", err)
	}
	if err := os.WriteFile(path, picture, 0o644); err != nil {
		b.t.Fatal(err)
	}
}
