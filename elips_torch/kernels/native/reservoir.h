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
    bool failed = false;

    void start() {
        n = 0;
        failed = false;
        limit = LOWEST;
        trigger = std::min(capacity, 2 * k + 32);
    }

    // Returns whether the threshold rose.
    bool push(int32_t row, float most, float least, float* scratch) {
        rows[n] = row;
        upper[n] = most;
        lower[n] = least;
        if (++n < trigger) return false;
        prune(scratch);
        if (n > capacity - capacity / 8) {
            failed = true;
            limit = HIGHEST;
            n = 0;
        }
        trigger = std::min(capacity, std::max(trigger, n + n / 2 + 16));
        return true;
    }

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
};
