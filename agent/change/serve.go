// SPDX-License-Identifier: MPL-2.0

package change

import (
	"encoding/json"
	"net/http"
	"time"

	"github.com/weirmesh/weir/agent/api"
)

// Serve answers with an api.ChangeList since the moment that is asked for.
func (l *Log) Serve(w http.ResponseWriter, r *http.Request) {
	since, err := api.ParseMoment(r.URL.Query().Get("since"), time.Now())
	if err != nil {
		http.Error(w, "parameter since: "+err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(l.List(since)) // who asked may be gone
}
