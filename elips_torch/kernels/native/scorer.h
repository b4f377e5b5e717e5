// Scores of rows by the definition, and the order that they give.
#pragma once

#include <cmath>
#include <cstring>

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

// Scores rows of a query by the definition.
template <class Value>
class Scorer {
   public:
    explicit Scorer(const Arguments& a) : a_(a), unpacked_(allocate<float>(a.dim)) {}

    bool is_ready() const { return static_cast<bool>(unpacked_); }

    void take(int64_t q) {
        take(a_.queries + q * a_.dim);
        if (a_.is_exact) offset_ = a_.offsets[q];
    }

    // A query that is not among those of the search; similarities of codes say nothing of it.
    void take(const double* query) {
        query_ = query;
        double square = 0.0;
        for (int i = 0; i < a_.dim; ++i) square += query_[i] * query_[i];
        length_ = std::sqrt(square);
    }

    // The score of a row whose similarity has this upper bound.
    Score of(int64_t row, float upper) {
        if (a_.is_exact) {
            const double similarity = std::nearbyint(2.0 * upper) / 2.0;
            const double value = a_.metric == L2 ? offset_ - 2.0 * similarity : offset_ + similarity;
            return {static_cast<float>(value) + 0.0f, true};
        }
        if (a_.packed.packing) {
            unpack(a_.packed, row, a_.dim, unpacked_.get());
            return score(a_.metric, query_, length_, unpacked_.get(), a_.dim);
        }
        const Value* vector = static_cast<const Value*>(a_.vectors) + row * a_.dim;
        if (is_distance(a_.metric)) return distance_score(a_.metric, a_.power, query_, vector, a_.dim);
        return score(a_.metric, query_, length_, vector, a_.dim);
    }

    // Ask for a row while others are scored.
    void prefetch(int64_t row) const {
        if (a_.is_exact) return;
        const bool packed = a_.packed.packing;
        const void* p = packed ? static_cast<const void*>(codes_of(a_.packed, row))
                               : static_cast<const Value*>(a_.vectors) + row * a_.dim;
        const int64_t bytes = packed ? a_.packed.code_size : int64_t(a_.dim) * int64_t(sizeof(Value));
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
    }

    // Whether two rows have the same bytes, and so the same score.
    bool are_same(int64_t x, int64_t y) const {
        if (a_.is_exact) return false;
        if (a_.packed.packing) {
            const int32_t* list = a_.packed.assignments;
            if (list && list[x] != list[y]) return false;
            return std::memcmp(codes_of(a_.packed, x), codes_of(a_.packed, y), a_.packed.code_size) == 0;
        }
        const Value* vectors = static_cast<const Value*>(a_.vectors);
        return std::memcmp(vectors + x * a_.dim, vectors + y * a_.dim, a_.dim * sizeof(Value)) == 0;
    }

    // What a row with this score is sorted by.
    Found found(int64_t row, float value) const {
        const bool descends = a_.metric == IP || a_.metric == COSINE;
        const int64_t name = name_of(a_, row);
        // NaN comes last; it is in no order with numbers.
        const float key = value != value ? HIGHEST : descends ? -value : value;
        return {key, a_.ranks ? a_.ranks[name] : name, name};
    }

    // Rows that are on their way from memory while one is scored.
    static constexpr int AHEAD = 6;

   private:
    const Arguments& a_;
    Memory<float> unpacked_;
    const double* query_ = nullptr;
    double offset_ = 0.0, length_ = 0.0;
};
