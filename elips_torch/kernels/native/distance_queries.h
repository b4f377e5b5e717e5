// Queries whose distances are sought, as float64 and as float32, where callers give them as they are.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "arguments.h"
#include "distances.h"
#include "memory.h"
#include "outcome.h"

// Whether distances are sure of a feature; of negative ones not, where all are to be positive.
static inline bool in_range(float x, bool is_signed) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (is_signed) bits &= 0x7FFFFFFF;
    return bits == 0 || (bits >= LEAST_BITS && bits <= MOST_BITS);
}

class DistanceQueries {
   public:
    // Returns as elips_search does.
    int make(Arguments& a) {
        const int64_t q = a.n_queries, n = q * a.dim;
        wide_ = allocate<double>(n + q);
        plain_ = allocate<float>(n + q);
        usable_ = allocate<uint8_t>(q);
        if (!wide_ || !plain_ || !usable_) return NO_MEMORY;
        switch (a.source_type) {
            case 0: copy<float>(a); break;
            case 1: copy<Half>(a); break;
            case 2: copy<BFloat>(a); break;
            default: return UNKNOWN_TYPE;
        }
        a.queries = wide_.get();
        a.query_codes = plain_.get();
        a.query_terms = plain_.get() + n;
        a.rounding = wide_.get() + n;
        std::fill(wide_.get() + n, wide_.get() + n + q, 0.0);
        a.usable = usable_.get();
        return DONE;
    }

   private:
    template <class Value>
    void copy(const Arguments& a) {
        const Value* values = static_cast<const Value*>(a.source);
        const bool is_ranged = a.metric == LINF || a.metric == CANBERRA || a.metric == BRAYCURTIS ||
                               a.metric == JENSENSHANNON || (a.metric == LP && !whole_power(a.power));
        float* terms = plain_.get() + int64_t(a.n_queries) * a.dim;
        double* to = wide_.get();
        float* plain = plain_.get();
        for (int64_t q = 0; q < a.n_queries; ++q) {
            double sum = 0.0;
            bool usable = true;
            for (int i = 0; i < a.dim; ++i) {
                *to = wide(*values++);
                *plain = static_cast<float>(*to++) + 0.0f;
                usable &= is_ranged ? in_range(*plain, a.metric != JENSENSHANNON) : std::isfinite(*plain);
                sum += std::fabs(*plain++);
            }
            usable_[q] = usable;
            // Beside a share of the distance, or of both sums.
            const double lost = 8.0 * a.dim * std::ldexp(1.0, -126) + FLOOR;
            terms[q] = static_cast<float>(1.0001 * (a.metric == JENSENSHANNON ? a.rounded * sum + lost : lost));
        }
    }

    Memory<double> wide_;
    Memory<float> plain_;
    Memory<uint8_t> usable_;
};
