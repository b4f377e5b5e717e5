// Rows within a radius: from which similarity on they are kept, and the order of those that are within.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "arguments.h"
#include "memory.h"
#include "reservoir.h"
#include "scorer.h"

// The similarity below which no score of a query is better than its radius.
static inline float least_similarity(const Arguments& a, int64_t q) {
    const bool descends = a.metric == IP || a.metric == COSINE;
    const bool by_distance = !a.codes && !a.packed.packing;
    // What similarities of codes lack.
    const double offset = by_distance ? 0.0 : a.offsets[q], radius = a.radius[q];
    double least = descends ? radius - offset : offset - radius;
    if (a.metric == L2 && !by_distance) least *= 0.5;
    // What float32 may not hold, with room for roundings.
    constexpr double MOST = 3e38;
    if (least < -MOST) return LOWEST;
    return least == HIGHEST ? HIGHEST : threshold(std::min(least, MOST), a.rounding[q]);
}

// Move the results of all queries together, in the order of the queries.
static inline void compact(const Arguments& a, const Reservoir* reservoirs) {
    int32_t* rows = reservoirs[0].rows + reservoirs[0].n;
    float* scores = reservoirs[0].upper + reservoirs[0].n;
    for (int64_t q = 1; q < a.n_queries; ++q) {
        const Reservoir& r = reservoirs[q];
        rows = std::copy(r.rows, r.rows + r.n, rows);
        scores = std::copy(r.upper, r.upper + r.n, scores);
    }
}

template <class Value>
class RangeRanking {
   public:
    explicit RangeRanking(const Arguments& a) : a_(a), scorer_(a), found_(allocate<Found>(a.capacity)) {}

    bool is_ready() const { return found_ && scorer_.is_ready(); }

    void query(int64_t q, Reservoir* reservoirs) {
        Reservoir& all = reservoirs[q];
        a_.status[q] = UNCERTIFIED;
        a_.status[a_.n_queries + q] = 0;
        if (!a_.usable[q]) return;
        if (!gather(q, reservoirs)) {
            a_.status[a_.n_queries + q] = count(q, reservoirs);
            return;
        }
        scorer_.take(q);
        int n = 0;
        bool sure = true;
        for (int i = 0; i < std::min(scorer_.AHEAD, all.n); ++i) scorer_.prefetch(all.rows[i]);
        for (int i = 0; i < all.n; ++i) {
            if (i + scorer_.AHEAD < all.n) scorer_.prefetch(all.rows[i + scorer_.AHEAD]);
            const Score score = scorer_.of(all.rows[i], all.upper[i]);
            sure &= score.sure;
            // What it says is of no use any more; of those that are sure, the score is.
            all.upper[i] = score.sure ? score.value : std::numeric_limits<float>::quiet_NaN();
            if (is_within(q, score.value)) found_[n++] = scorer_.found(all.rows[i], score.value);
        }
        if (sure) write(all, n);
        a_.status[q] = sure ? CERTIFIED : UNSURE;
        a_.status[a_.n_queries + q] = all.n;
    }

   private:
    bool is_within(int64_t q, float score) const {
        return a_.metric == IP || a_.metric == COSINE ? score > a_.radius[q] : score < a_.radius[q];
    }

    // Rows that the query has met, as many as four bytes hold.
    int32_t count(int64_t q, const Reservoir* reservoirs) const {
        int64_t total = 0;
        for (int part = 0; part < a_.n_parts; ++part) {
            const Reservoir& r = reservoirs[int64_t(part) * a_.n_queries + q];
            total += r.failed ? r.met : r.n;
        }
        return static_cast<int32_t>(std::min<int64_t>(total, std::numeric_limits<int32_t>::max()));
    }

    // Gather what all threads have kept into the first reservoir, unless that is too small.
    bool gather(int64_t q, Reservoir* reservoirs) {
        Reservoir& all = reservoirs[q];
        if (count(q, reservoirs) > a_.capacity) return false;
        for (int part = 0; part < a_.n_parts; ++part)
            if (reservoirs[int64_t(part) * a_.n_queries + q].failed) return false;
        for (int part = 1; part < a_.n_parts; ++part) {
            const Reservoir& r = reservoirs[int64_t(part) * a_.n_queries + q];
            std::copy(r.rows, r.rows + r.n, all.rows + all.n);
            std::copy(r.upper, r.upper + r.n, all.upper + all.n);
            all.n += r.n;
        }
        return true;
    }

    void write(Reservoir& all, int n) {
        const bool descends = a_.metric == IP || a_.metric == COSINE;
        std::sort(found_.get(), found_.get() + n);
        for (int i = 0; i < n; ++i) {
            all.rows[i] = static_cast<int32_t>(found_[i].name);
            all.upper[i] = (descends ? -found_[i].key : found_[i].key) + 0.0f;
        }
        all.n = n;
    }

    const Arguments& a_;
    Scorer<Value> scorer_;
    Memory<Found> found_;
};
