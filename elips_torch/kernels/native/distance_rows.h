// The rows whose distances are sought, a chunk at a time, as float32.
#pragma once

#include <algorithm>
#include <limits>

#include "arguments.h"
#include "distances.h"
#include "memory.h"
#include "rescore.h"

// One array a term.
struct DistanceChunk {
    int64_t first;
    const int64_t* slots;  // rows; null where they follow the first
    int n;
    const float** rows;
    float* error;  // by how much a distance may err beside what its size and the query say

    int64_t row(int r) const { return slots ? slots[r] : first + r; }
};

template <class Distance>
class DistanceRows {
   public:
    explicit DistanceRows(const Arguments& a)
        : a_(a), most_(std::clamp<int64_t>(CHUNK_BYTES / (4 * int64_t(a.dim)) / STEP * STEP, STEP, MOST_ROWS)) {}

    // Rows of a chunk, at most.
    int64_t most() const { return most_; }

    bool prepare() {
        rows_ = allocate<const float*>(most_);
        errors_ = allocate<float>(most_ + LANES);
        if (a_.vector_type) converted_ = allocate<float>(most_ * a_.dim);
        if (errors_) std::fill(errors_.get(), errors_.get() + most_, 0.0f);
        return rows_ && errors_ && (converted_ || !a_.vector_type);
    }

    DistanceChunk take(int64_t first, const int64_t* slots, int n) {
        const DistanceChunk c = {first, slots, n, rows_.get(), errors_.get()};
        for (int r = 0; r < std::min(n, AHEAD); ++r) prefetch(c, r);
        switch (a_.vector_type) {
            case 1: fill<Half>(c); break;
            case 2: fill<BFloat>(c); break;
            default: fill<float>(c);
        }
        return c;
    }

    // Ask for the rows that follow n rows of a chunk soon, where nobody has read them.
    void prefetch_ahead(const DistanceChunk& c, int r, int n) const {
        if (READS_ALL || a_.vector_type || !c.slots) return;
        for (int i = r + AHEAD; i < std::min(r + AHEAD + n, c.n); ++i) prefetch(c, i);
    }

   private:
    static constexpr int64_t CHUNK_BYTES = 96 * 1024, MOST_ROWS = 4096, STEP = 16;
    static constexpr int AHEAD = 12;
    // The terms of rows are made of all features.
    static constexpr bool READS_ALL = Distance::NEEDS_RANGE;

    void prefetch(const DistanceChunk& c, int r) const {
        if (!c.slots) return;
        const int64_t size = int64_t(a_.dim) * (a_.vector_type ? 2 : 4);
        const char* place = static_cast<const char*>(a_.vectors) + c.slots[r] * size;
        for (int64_t i = 0; i < size; i += 64) _mm_prefetch(place + i, _MM_HINT_T0);
        _mm_prefetch(place + size - 1, _MM_HINT_T0);
    }

    template <class Value>
    void fill(const DistanceChunk& c) {
        constexpr bool CONVERTS = !std::is_same_v<Value, float>;
        const Value* vectors = static_cast<const Value*>(a_.vectors);
        const float share = static_cast<float>(a_.rounded);
        for (int r = 0; r < c.n; ++r) {
            const Value* row = vectors + c.row(r) * a_.dim;
            if ((READS_ALL || CONVERTS) && r + AHEAD < c.n) prefetch(c, r + AHEAD);
            if constexpr (CONVERTS) {
                float* to = converted_.get() + int64_t(r) * a_.dim;
                convert(row, a_.dim, to);
                c.rows[r] = to;
            } else {
                c.rows[r] = row;
            }
            if constexpr (READS_ALL) c.error[r] = error_of(c.rows[r], share);
        }
    }

    // Infinite where a feature is out of range.
    float error_of(const float* row, float share) const {
        unsigned outside = 0;
        Floats sums = all(0.0f);
        int i = 0;
        for (; i + LANES <= a_.dim; i += LANES) {
            const Floats x = load(row + i);
            outside |= out_of_range(x);
            if (!Distance::SIGNED) sums = plus(sums, x);
        }
        if (i < a_.dim) {
            const Floats x = load_first(row + i, a_.dim - i);
            outside |= out_of_range(x);
            if (!Distance::SIGNED) sums = plus(sums, x);
        }
        if (outside) return HIGHEST;
        return Distance::SIGNED ? 0.0f : sum(sums) * share;
    }

    static unsigned out_of_range(Floats x) {
        return not_zero_or_between(Distance::SIGNED ? magnitude(x) : x, LEAST_BITS, MOST_BITS);
    }

    const Arguments& a_;
    const int64_t most_;
    Memory<const float*> rows_;
    Memory<float> errors_, converted_;
};
