// The survivors of each query, scored by the definition and sorted.
#pragma once

#include <algorithm>

#include "arguments.h"
#include "memory.h"
#include "reservoir.h"
#include "scorer.h"
#include "settle.h"

template <class Value>
class Ranking {
   public:
    explicit Ranking(const Arguments& a) : a_(a), scorer_(a), found_(allocate<Found>(int64_t(a.n_parts) * a.capacity)) {
        scratch_ = allocate<float>(int64_t(a.n_parts) * a.capacity);
    }

    bool is_ready() const { return found_ && scratch_ && scorer_.is_ready(); }

    void query(int64_t q, Reservoir* reservoirs) {
        float* scores = a_.scores + q * a_.k;
        int64_t* found = a_.found + q * a_.k;
        const bool descends = a_.metric == IP || a_.metric == COSINE;
        std::fill(scores, scores + a_.k, descends ? LOWEST : HIGHEST);
        std::fill(found, found + a_.k, -1);
        a_.status[a_.n_queries + q] = 0;
        Reservoir& all = reservoirs[q];
        if (!merge(q, reservoirs)) {
            a_.status[q] = UNCERTIFIED;
            return;
        }
        a_.status[a_.n_queries + q] = all.n;
        scorer_.take(q);
        bool sure = true;
        for (int i = 0; i < std::min(AHEAD, all.n); ++i) scorer_.prefetch(all.rows[i]);
        for (int i = 0; i < all.n; ++i) {
            const int64_t row = all.rows[i];
            if (i + AHEAD < all.n) scorer_.prefetch(all.rows[i + AHEAD]);
            const Score score = scorer_.of(row, all.upper[i]);
            sure &= score.sure;
            all.upper[i] = score.value;
            found_[i] = scorer_.found(row, score.value);
        }
        const int n = std::min(all.n, a_.k);
        Found* last = found_.get() + all.n;
        if (n < all.n) std::nth_element(found_.get(), found_.get() + n, last);
        std::sort(found_.get(), found_.get() + n);
        for (int i = 0; i < n; ++i) {
            scores[i] = (descends ? -found_[i].key : found_[i].key) + 0.0f;
            found[i] = found_[i].name;
        }
        a_.status[q] = sure ? CERTIFIED : UNSURE;
    }

   private:
    static constexpr int AHEAD = Scorer<Value>::AHEAD;

    // Of what must be known of a packed row before its codes are read.
    void prefetch_facts(int64_t row) const {
        if (a_.packed.places) __builtin_prefetch(a_.packed.places + row);
        if (a_.packed.assignments) __builtin_prefetch(a_.packed.assignments + row);
    }

    // Gather what all threads have kept into the first reservoir.
    bool merge(int64_t q, Reservoir* reservoirs) {
        Reservoir& all = reservoirs[q];
        float limit = LOWEST;
        int total = 0;
        for (int part = 0; part < a_.n_parts; ++part) {
            const Reservoir& r = reservoirs[int64_t(part) * a_.n_queries + q];
            limit = std::max(limit, r.limit);
            std::copy(r.lower, r.lower + r.n, scratch_.get() + total);
            total += r.n;
        }
        if (total >= a_.k) {
            const float lowest = close_to_kth(scratch_.get(), total, a_.k);
            if (lowest > LOWEST) limit = std::max(limit, threshold(lowest, all.rounding));
        }
        int n = 0;
        for (int part = 0; part < a_.n_parts; ++part) {
            const Reservoir& r = reservoirs[int64_t(part) * a_.n_queries + q];
            if (!r.is_complete(limit)) return false;
            for (int i = 0; i < r.n; ++i) {
                if (r.upper[i] < limit) continue;
                // Each thread has kept as many rows as all may.
                if (n == a_.capacity) {
                    all.n = n;
                    if (!settle<Value>(a_, q, all)) return false;
                    n = all.n;
                }
                all.rows[n] = r.rows[i];
                all.lower[n] = r.lower[i];
                if (a_.packed.packing) prefetch_facts(r.rows[i]);
                all.upper[n++] = r.upper[i];
            }
        }
        all.n = n;
        return true;
    }

    const Arguments& a_;
    Scorer<Value> scorer_;
    Memory<Found> found_;
    Memory<float> scratch_;
};
