// The queries of a scan by distances, in the order in which they are read.
#pragma once

#include <algorithm>

#include "arguments.h"
#include "keeper.h"
#include "memory.h"
#include "products.h"

// Up to 2 vectors of queries, by how much their distances may err, and what these are compared with.
struct DistanceBlock {
    static constexpr int VECTORS = 2;

    int n;        // queries
    int vectors;  // of LANES queries; 0 where they are so few that each row is read for one at a time
    int32_t queries[VECTORS * LANES];
    float* packed;
    float error[VECTORS * LANES];
    float limit[VECTORS * LANES];
};

class DistanceBlocks {
   public:
    explicit DistanceBlocks(const Arguments& a) : a_(a) {}

    // Make room for so many queries.
    bool prepare(int64_t n) {
        const int64_t vectors = (n + LANES - 1) / LANES;
        blocks_ = allocate<DistanceBlock>(vectors + 1);
        packed_ = allocate<float>(vectors * LANES * a_.dim);
        return blocks_ && packed_;
    }

    int size() const { return size_; }

    DistanceBlock& operator[](int i) { return blocks_[i]; }

    const float* query(int64_t number) const { return static_cast<const float*>(a_.query_codes) + number * a_.dim; }

    // Take n queries by their numbers, or in a row from `first`, with what they are kept by.
    __attribute__((noinline)) void take(const Keeper& keeper, const int32_t* queries, int first, int n) {
        float* packed = packed_.get();
        size_ = 0;
        for (int i = 0; i < n;) {
            DistanceBlock& block = blocks_[size_++];
            // Few lanes of the last vector may be in use.
            const int vectors = std::min((n - i + LANES - 1) / LANES, DistanceBlock::VECTORS);
            block.vectors = n - i <= FEW_LANES ? 0 : vectors;
            block.n = std::min(n - i, vectors * LANES);
            for (int j = 0; j < block.n; ++j) block.queries[j] = queries ? queries[i + j] : first + i + j;
            block.packed = packed;
            fill(block, keeper);
            packed += int64_t(block.vectors) * LANES * a_.dim;
            i += block.n;
        }
    }

   private:
    // So few queries meet a row one after the other.
    static constexpr int FEW_LANES = LANES / 2;

    void fill(DistanceBlock& block, const Keeper& keeper) {
        constexpr int MOST = DistanceBlock::VECTORS * LANES;
        const float* queries[MOST];
        for (int i = 0; i < block.n; ++i) queries[i] = query(block.queries[i]);
        if (block.vectors == 2) pack_queries<float, 2>(queries, block.n, a_.dim, block.packed);
        if (block.vectors == 1) pack_queries<float, 1>(queries, block.n, a_.dim, block.packed);
        for (int i = 0; i < MOST; ++i) {
            const bool real = i < block.n;
            block.error[i] = real ? a_.query_terms[block.queries[i]] : 0.0f;
            block.limit[i] = real ? keeper.limit(block.queries[i]) : HIGHEST;
        }
    }

    const Arguments& a_;
    int size_ = 0;
    Memory<DistanceBlock> blocks_;
    Memory<float> packed_;
};
