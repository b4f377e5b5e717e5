// The rows of a query that may still matter, and the threshold below which no other row does.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "lanes.h"

constexpr float LOWEST = -std::numeric_limits<float>::infinity();
constexpr float HIGHEST = std::numeric_limits<float>::infinity();
constexpr double UNIT = 1.0 / 16777216.0;  // roundoff of float32
constexpr float FLOOR = 1.0f / 1267650600228229401496703205376.0f;  // 2**-100, part of every error

// The similarity below which no row matters once k rows are known to have `lowest`. Scores are
// compared as float32: what differs by less may tie, and the lower id wins.
static inline float threshold(double lowest, double rounding) {
    const double least = lowest - 8.0 * UNIT * (std::fabs(lowest) + rounding) - 2.0 * FLOOR;
    return std::nextafter(static_cast<float>(least), LOWEST);
}

// Integers in the order of the floats, and back.
static inline int32_t order_of(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}
static inline float float_at(int32_t order) {
    const int32_t bits = order ^ ((order >> 31) & 0x7FFFFFFF);
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

static inline int count_not_below(const float* values, int n, float least) {
    const Floats level = all(least);
    int count = 0, i = 0;
    for (; i + LANES <= n; i += LANES) count += __builtin_popcount(not_below(load(values + i), level));
    if (i < n)
        count += __builtin_popcount(not_below(load_first(values + i, n - i), level) & ((1u << (n - i)) - 1));
    return count;
}

// A number that at least k of the n values reach, close to the k-th largest of them; LOWEST where fewer
// are above that. Halving the interval takes a fraction of what selecting takes; 33 times find the k-th.
static inline float close_to_kth(const float* values, int n, int k, int halvings = 20) {
    float low = HIGHEST, high = LOWEST;
    int finite = 0;
    for (int i = 0; i < n; ++i) {
        const bool counts = values[i] > LOWEST;
        finite += counts;
        low = counts && values[i] < low ? values[i] : low;
        high = values[i] > high ? values[i] : high;
    }
    if (finite < k) return LOWEST;
    int64_t from = order_of(low), to = int64_t(order_of(high)) + 1;
    for (int i = 0; i < halvings && to - from > 1; ++i) {
        const int64_t middle = from + (to - from) / 2;
        const int count = count_not_below(values, n, float_at(static_cast<int32_t>(middle)));
        if (count >= k) {
            from = middle;
            if (count == k) break;
        } else {
            to = middle;
        }
    }
    return float_at(static_cast<int32_t>(from));
}

// Rows that memory holds beside the capacity: whole vectors are read and written.
constexpr int SPARE = 16;

// The rows of a query that may still matter.
struct Reservoir {
    int32_t* rows;
    float* upper;
    float* lower;
    int capacity;
    int k;
    double rounding;

    int n = 0;
    int trigger = 0;
    float limit = LOWEST;
    // The largest upper bound of what was dropped for want of room.
    float lost = LOWEST;
    bool failed = false;
    // Nothing is dropped: all rows that reach the limit are kept, or it fails and counts them.
    bool keeps_all = false;
    int64_t met = 0;
    // Rows that were scored to tell them apart.
    int64_t scored = 0;

    void start() {
        n = 0;
        scored = 0;
        failed = false;
        limit = lost = LOWEST;
        trigger = std::min(capacity, 2 * k + 32);
    }

    void keep_all_from(float least) {
        keeps_all = true;
        limit = least;
        trigger = capacity;
    }

    void fail() {
        failed = true;
        limit = HIGHEST;
        n = 0;
    }

    // Returns whether the threshold may have risen. Where bounds leave too many rows, `settle` is to drop some for
    // good, all but k, and to return whether it has.
    template <class Settle>
    bool push(int32_t row, float most, float least, Settle settle) {
        rows[n] = row;
        upper[n] = most;
        lower[n] = least;
        if (++n < trigger) return false;
        if (keeps_all) {
            met = n;
            n = 0;
            failed = true;
            return false;
        }
        prune();
        if (n > capacity - capacity / 8 && !settle(*this)) shed();
        trigger = std::min(capacity, std::max(trigger, n + n / 4 + 16));
        return true;
    }

    // Whether every row that matters is kept, now that no row is left.
    bool is_complete(float last_limit) const { return !failed && (lost == LOWEST || lost < last_limit); }

   private:
    void prune() {
        if (n >= k) {
            const float lowest = close_to_kth(lower, n, k);
            if (lowest > LOWEST) limit = std::max(limit, threshold(lowest, rounding));
        }
        drop_below(limit);
    }

    // Make room by dropping the half that is bounded lowest. Better rows may still come, and then
    // nothing was lost.
    void shed() {
        const float least = close_to_kth(upper, n, capacity / 2, 33);
        lost = std::max(lost, least);
        drop_below(std::nextafter(least, HIGHEST));
        if (n > capacity / 2) fail();
    }

    void drop_below(float least) {
        const Floats level = all(least);
        int kept = 0;
        for (int i = 0; i < n; i += LANES) {
            unsigned bits = not_below(load(upper + i), level);
            if (i + LANES > n) bits &= (1u << (n - i)) - 1;
            store_chosen(rows + kept, bits, rows + i);
            store_chosen(upper + kept, bits, upper + i);
            store_chosen(lower + kept, bits, lower + i);
            kept += __builtin_popcount(bits);
        }
        n = kept;
    }
};
