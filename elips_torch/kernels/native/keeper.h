// What a thread keeps of the rows that it meets, by what each query may see.
#pragma once

#include <algorithm>

#include "arguments.h"
#include "reservoir.h"
#include "settle.h"
#include "within.h"

class Keeper {
   public:
    // Threads that share the rows share limits (Q,), too; else these are null.
    Keeper(const Arguments& a, int part, float* limits)
        : a_(a), limits_(limits), is_selective_((a.mask && a.mask_rows) || a.n_excluded > 0) {
        const int64_t q = a.n_queries, c = a.capacity + SPARE;
        rows_ = static_cast<int32_t*>(a.memory) + part * q * c;
        upper_ = static_cast<float*>(a.memory) + (a.n_parts + part) * q * c;
        lower_ = static_cast<float*>(a.memory) + (2 * a.n_parts + part) * q * c;
    }

    // Make ready for the queries from `first` to `last`.
    __attribute__((noinline)) void prepare(Reservoir* reservoirs, int first, int last) {
        reservoirs_ = reservoirs;
        for (int q = first; q < last; ++q) {
            Reservoir& r = reservoirs_[q];
            const int64_t place = int64_t(q) * (a_.capacity + SPARE);
            r.rows = rows_ + place;
            r.upper = upper_ + place;
            r.lower = lower_ + place;
            r.capacity = a_.capacity;
            r.k = a_.k;
            r.rounding = a_.rounding[q];
            r.start();
            if (a_.radius) r.keep_all_from(least_similarity(a_, q));
            if (!a_.usable[q]) r.fail();
        }
    }

    float limit(int64_t query) const { return reservoirs_[query].limit; }

    bool shares_limits() const { return limits_; }

    // The limit, where another thread has found a higher one that.
    float shared_limit(int64_t query) {
        float other;
        __atomic_load(limits_ + query, &other, __ATOMIC_RELAXED);
        Reservoir& r = reservoirs_[query];
        if (other > r.limit) r.limit = other;
        return r.limit;
    }

    // Whether no query sees a row, or there is none.
    bool hidden(int64_t row) const {
        if (!is_row(a_, row)) return true;
        return a_.mask && !a_.mask_rows && !a_.mask[name_of(a_, row) * a_.mask_step];
    }

    // Keep a row that is not hidden, if the query sees it; returns whether the limit may have risen.
    bool keep(int64_t row, int64_t query, float upper, float lower) {
        if (is_selective_ && !sees(query, name_of(a_, row))) return false;
        Reservoir& reservoir = reservoirs_[query];
        if (reservoir.failed) {
            ++reservoir.met;
            return false;
        }
        const auto settle = [&](Reservoir& r) { return settle_any(a_, query, r); };
        if (!reservoir.push(static_cast<int32_t>(row), upper, lower, settle)) return false;
        if (limits_) {
            float other;
            __atomic_load(limits_ + query, &other, __ATOMIC_RELAXED);
            if (reservoir.limit > other) __atomic_store(limits_ + query, &reservoir.limit, __ATOMIC_RELAXED);
        }
        return true;
    }

   private:
    bool sees(int64_t query, int64_t row) const {
        if (a_.mask && a_.mask_rows && !a_.mask[a_.mask_rows[query] * a_.mask_stride + row * a_.mask_step])
            return false;
        const int64_t* out = a_.exclude + query * a_.n_excluded;
        return !std::binary_search(out, out + a_.n_excluded, row);
    }

    const Arguments& a_;
    float* limits_;
    const bool is_selective_;
    int32_t* rows_;
    float* upper_;
    float* lower_;
    Reservoir* reservoirs_ = nullptr;
};
