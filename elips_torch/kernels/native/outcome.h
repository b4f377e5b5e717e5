// What the functions return.
#pragma once

// NO_MEMORY, UNKNOWN_TYPE: nothing was done. UNBOUNDED: a row is too large. OPEN: some query has no certificate.
// SHORT: all have one, some have found fewer than k rows.
enum Outcome : int { DONE = 0, NO_MEMORY = 1, UNKNOWN_TYPE = 2, UNBOUNDED = 3, OPEN = 4, SHORT = 5 };
