// The rows of one query that may still matter, and the threshold below which no other row does.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

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

    void start() {
        n = 0;
        failed = false;
        limit = lost = LOWEST;
        trigger = std::min(capacity, 2 * k + 32);
    }

    // Returns whether the threshold rose.
    bool push(int32_t row, float most, float least, float* scratch) {
        rows[n] = row;
        upper[n] = most;
        lower[n] = least;
        if (++n < trigger) return false;
        prune(scratch);
        if (n > capacity - capacity / 8) shed(scratch);
        trigger = std::min(capacity, std::max(trigger, n + n / 2 + 16));
        return true;
    }

    // Whether every row that matters is kept, now that no row is left.
    bool is_complete(float last_limit) const { return !failed && (lost == LOWEST || lost < last_limit); }

    void raise(float other) { limit = std::max(limit, other); }

    void prune(float* scratch) {
        if (n >= k) {
            std::copy(lower, lower + n, scratch);
            std::nth_element(scratch, scratch + k - 1, scratch + n, std::greater<float>());
            if (scratch[k - 1] > LOWEST) raise(threshold(scratch[k - 1], rounding));
        }
        int kept = 0;
        for (int i = 0; i < n; ++i) {
            rows[kept] = rows[i];
            upper[kept] = upper[i];
            lower[kept] = lower[i];
            kept += !(upper[i] < limit);
        }
        n = kept;
    }

   private:
    // Make room by dropping the half that is bounded lowest. Better rows may still come, and then
    // nothing was lost.
    void shed(float* scratch) {
        const int left = capacity / 2;
        std::copy(upper, upper + n, scratch);
        std::nth_element(scratch, scratch + left, scratch + n, std::greater<float>());
        const float least = scratch[left];
        lost = std::max(lost, least);
        int kept = 0;
        for (int i = 0; i < n; ++i) {
            if (upper[i] <= least) continue;
            rows[kept] = rows[i];
            upper[kept] = upper[i];
            lower[kept++] = lower[i];
        }
        n = kept;
    }
};
