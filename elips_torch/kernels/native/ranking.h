// The survivors of each query, scored by the definition and sorted.
#pragma once

#include <algorithm>
#include <cmath>

#include "arguments.h"
#include "distance_scores.h"
#include "memory.h"
#include "reservoir.h"
#include "rescore.h"

struct Found {
    float key;  // ascends
    int64_t rank;
    int64_t name;
    bool operator<(const Found& other) const {
        return key < other.key || (key == other.key && rank < other.rank);
    }
};

template <class Value>
class Ranking {
   public:
    explicit Ranking(const Arguments& a) : a_(a), found_(allocate<Found>(int64_t(a.n_parts) * a.capacity)) {
        scratch_ = allocate<float>(int64_t(a.n_parts) * a.capacity);
        unpacked_ = allocate<float>(a.dim);
    }

    bool is_ready() const { return found_ && scratch_ && unpacked_; }

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
        const double* query = a_.queries + q * a_.dim;
        double square = 0.0;
        for (int i = 0; i < a_.dim; ++i) square += query[i] * query[i];
        const double length = std::sqrt(square);
        bool sure = true;
        for (int i = 0; i < std::min(AHEAD, all.n) && !a_.is_exact; ++i) prefetch(all.rows[i]);
        for (int i = 0; i < all.n; ++i) {
            const int64_t row = all.rows[i];
            float value;
            if (a_.is_exact) {
                const double similarity = std::nearbyint(2.0 * all.upper[i]) / 2.0;
                value = static_cast<float>(a_.metric == L2 ? a_.offsets[q] - 2.0 * similarity
                                                           : a_.offsets[q] + similarity) +
                        0.0f;
            } else {
                if (i + AHEAD < all.n) prefetch(all.rows[i + AHEAD]);
                const Score result = score_of(query, length, row);
                value = result.value;
                sure &= result.sure;
            }
            all.upper[i] = value;
            const int64_t name = name_of(a_, row);
            // NaN comes last; it is in no order with numbers.
            const float key = value != value ? HIGHEST : descends ? -value : value;
            found_[i] = {key, a_.ranks ? a_.ranks[name] : name, name};
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
    // Rows that are on their way from memory while one is scored.
    static constexpr int AHEAD = 6;

    void prefetch(int64_t row) const {
        const bool packed = a_.packed.packing;
        const void* p = packed ? static_cast<const void*>(codes_of(a_.packed, row))
                               : static_cast<const Value*>(a_.vectors) + row * a_.dim;
        const int64_t bytes = packed ? a_.packed.code_size : int64_t(a_.dim) * int64_t(sizeof(Value));
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
    }

    // Of what must be known of a packed row before its codes are read.
    void prefetch_facts(int64_t row) const {
        if (a_.packed.places) __builtin_prefetch(a_.packed.places + row);
        if (a_.packed.assignments) __builtin_prefetch(a_.packed.assignments + row);
    }

    Score score_of(const double* query, double length, int64_t row) {
        if (a_.packed.packing) {
            unpack(a_.packed, row, a_.dim, unpacked_.get());
            return score(a_.metric, query, length, unpacked_.get(), a_.dim);
        }
        const Value* vector = static_cast<const Value*>(a_.vectors) + row * a_.dim;
        if (is_distance(a_.metric)) return distance_score(a_.metric, a_.power, query, vector, a_.dim);
        return score(a_.metric, query, length, vector, a_.dim);
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
                if (n == a_.capacity) return false;
                all.rows[n] = r.rows[i];
                if (a_.packed.packing) prefetch_facts(r.rows[i]);
                all.upper[n++] = r.upper[i];
            }
        }
        all.n = n;
        return true;
    }

    const Arguments& a_;
    Memory<Found> found_;
    Memory<float> scratch_, unpacked_;
};
