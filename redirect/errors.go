// SPDX-License-Identifier: MPL-2.0

package redirect

// Errors that callers tell apart with errors.Is.
var ()
