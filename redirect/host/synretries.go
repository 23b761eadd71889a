// SPDX-License-Identifier: MPL-2.0

package host

import (
	"errors"
	"fmt"
	"io/fs"
	"strconv"

	"github.com/weirmesh/weir/redirect/host/sysctl"
)

// KeepDialling has what dials in the namespace send its SYN again every second for so
// many seconds, before the gaps double. The kernel does so for four (Linux 6.5; tcp(7)
// has older ones double from the beginning, which stays as it is), and a proxy that
// needs 12 seconds to start would be found after 19. The number is never lowered, and
// not put back: a connection that nobody answers gives up that much later.
func (ns *Namespace) KeepDialling(seconds int, keys *sysctl.Keys) error {
	key := []string{"net", "ipv4", "tcp_syn_linear_timeouts"}
	err := ns.Do(func() error {
		text, err := keys.Read(key...)
		if err != nil {
			return err
		}
		if now, err := strconv.Atoi(text); err != nil || now >= seconds {
			return err
		}
		return keys.Write(strconv.Itoa(seconds), key...)
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("let connections be tried every second: %w", err)
	}
	return nil
}
