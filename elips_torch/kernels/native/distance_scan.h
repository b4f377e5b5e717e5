// The scan of rows by distances: each is bounded where it is computed, and what reaches its query's threshold is
// kept. Similarities are distances with the other sign.
//
// Many queries: each lane is a query. Few queries: lanes are features, and sums are taken across them.
#pragma once

#include <algorithm>

#include "arguments.h"
#include "distance_blocks.h"
#include "distance_rows.h"
#include "distances.h"
#include "keeper.h"
#include "probed_lists.h"
#include "products.h"

template <class Distance>
class DistanceScan {
   public:
    DistanceScan(const Arguments& a, int part, float* limits) : a_(a), keeper_(a, part, limits), source_(a), blocks_(a), distance_(a) {
        // Errors are shares of distances, or of the sums that the terms of queries and rows are made of.
        const double share = a.metric == JENSENSHANNON ? 0.0 : a.rounded, unit = a.metric == GOWER ? 1.0 / a.dim : 1.0;
        upper_scale_ = static_cast<float>(-(1.0 - share) * unit);
        lower_scale_ = static_cast<float>(-(1.0 + share) * unit);
    }

    int64_t n_chunks() const { return (a_.n_rows + source_.most() - 1) / source_.most(); }

    // Make ready for the queries from `first` to `last`.
    bool prepare(Reservoir* reservoirs, int first, int last) {
        if (!source_.prepare() || !blocks_.prepare(last - first)) return false;
        keeper_.prepare(reservoirs, first, last);
        return true;
    }

    // Take the queries that are to meet the rows of a list, or all: n numbers, or n in a row from `first`.
    void take(const int32_t* queries, int first, int n, int64_t) { blocks_.take(keeper_, queries, first, n); }

    void chunk(int64_t number) {
        const int64_t first = number * source_.most();
        chunk(first, nullptr, static_cast<int>(std::min(source_.most(), a_.n_rows - first)));
    }

    void list(int64_t number) {
        visit_list(a_, number, source_.most(), [&](int64_t first, const int64_t* slots, int n) { chunk(first, slots, n); });
    }

   private:
    using Sums = typename Distance::Sums;
    using Block = DistanceBlock;
    static constexpr int ROWS = LANES == 16 ? 6 : 2;

    // Compiled once, though it is called from two places.
    __attribute__((noinline)) void chunk(int64_t first, const int64_t* slots, int n) {
        const DistanceChunk c = source_.take(first, slots, n);
        for (int b = 0; b < blocks_.size(); ++b) {
            Block& block = blocks_[b];
            if (keeper_.shares_limits())
                for (int i = 0; i < block.n; ++i) block.limit[i] = keeper_.shared_limit(block.queries[i]);
            switch (block.vectors) {
                case 0: few(c, block); break;
                case 1: tiles<2 * ROWS, 1>(c, block); break;
                default: tiles<ROWS, 2>(c, block);
            }
        }
    }

    // Where a distance is infinite or NaN, nothing is known: NaN.
    Floats upper(Floats distance, Floats error) const {
        return times_plus(distance, all(0.0f), times_plus(distance, all(upper_scale_), error));
    }
    Floats lower(Floats distance, Floats error) const {
        const Floats least = minus(times(distance, all(lower_scale_)), error);
        return larger(times_plus(distance, all(0.0f), least), all(LOWEST));
    }

    template <int ROWS, int VECTORS>
    void tiles(const DistanceChunk& c, Block& block) {
        for (int first = 0; first < c.n; first += ROWS) {
            const int n = std::min(ROWS, c.n - first);
            if (&block == &blocks_[0]) source_.prefetch_ahead(c, first, ROWS);
            const float* rows[ROWS];
            for (int r = 0; r < ROWS; ++r) rows[r] = c.rows[first + std::min(r, n - 1)];
            Sums sums[ROWS][VECTORS];
            compare<ROWS, VECTORS>(rows, block.packed, sums);
#pragma GCC unroll 16
            for (int v = 0; v < VECTORS; ++v) {
                const Floats error = load(block.error + v * LANES), limit = load(block.limit + v * LANES);
#pragma GCC unroll 16
                for (int r = 0; r < ROWS; ++r) {
                    const int place = first + std::min(r, n - 1);
                    const Floats distance = Distance::distance(sums[r][v]);
                    const unsigned reached = not_below(upper(distance, plus(error, all(c.error[place]))), limit);
                    if (__builtin_expect(reached != 0, 0) && r < n && !keeper_.hidden(c.row(place)))
                        keep_all(c, place, block, v, reached, distance);
                }
            }
        }
    }

    template <int ROWS, int VECTORS>
    void compare(const float* const* rows, const float* queries, Sums (&sums)[ROWS][VECTORS]) const {
        Sums local[ROWS][VECTORS];
        const Distance distance = distance_;
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
            for (int v = 0; v < VECTORS; ++v) local[r][v] = Distance::start();
        for (int i = 0; i < a_.dim; ++i, queries += VECTORS * LANES) {
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
                for (int v = 0; v < VECTORS; ++v) distance.add(local[r][v], load(queries + v * LANES), all(rows[r][i]));
        }
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
            for (int v = 0; v < VECTORS; ++v) sums[r][v] = local[r][v];
    }

    __attribute__((noinline)) void keep_all(const DistanceChunk& c, int r, Block& block, int v, unsigned reached,
                                            Floats distance) {
        const Floats error = plus(load(block.error + v * LANES), all(c.error[r])), most = upper(distance, error);
        // Limits rise while rows of a tile are kept.
        reached &= not_below(most, load(block.limit + v * LANES));
        const Bounds bounds(most, lower(distance, error));
        for (; reached; reached &= reached - 1) {
            const int lane = __builtin_ctz(reached);
            keep(c.row(r), block, v * LANES + lane, bounds, lane);
        }
    }

    struct Bounds {
        alignas(64) float upper[LANES];
        alignas(64) float lower[LANES];

        Bounds(Floats most, Floats least) {
            store(upper, most);
            store(lower, least);
        }
    };

    void keep(int64_t row, Block& block, int i, const Bounds& bounds, int lane) {
        if (i >= block.n) return;
        const int64_t q = block.queries[i];
        if (keeper_.keep(row, q, bounds.upper[lane], bounds.lower[lane])) block.limit[i] = keeper_.limit(q);
    }

    void few(const DistanceChunk& c, Block& block) {
        for (int i = 0; i < block.n; ++i) {
            const float* own = blocks_.query(block.queries[i]);
            const Floats every = all(block.error[i]);
            for (int first = 0; first < c.n; first += LANES) {
                const int n = std::min(LANES, c.n - first);
                if (i == 0 && &block == &blocks_[0]) source_.prefetch_ahead(c, first, LANES);
                alignas(64) float distances[LANES] = {};
                for (int r = 0; r < n; r += FEW) {
                    const float* rows[FEW];
                    for (int j = 0; j < FEW; ++j) rows[j] = c.rows[first + std::min(r + j, n - 1)];
                    across(rows, own, distances + r);
                }
                const Floats distance = load(distances), error = plus(every, load_first(c.error + first, n));
                const Floats most = upper(distance, error);
                unsigned reached = not_below(most, all(block.limit[i])) & ((1u << n) - 1);
                if (!reached) continue;
                const Bounds bounds(most, lower(distance, error));
                for (; reached; reached &= reached - 1) {
                    const int r = __builtin_ctz(reached);
                    if (!(bounds.upper[r] < block.limit[i]) && !keeper_.hidden(c.row(first + r)))
                        keep(c.row(first + r), block, i, bounds, r);
                }
            }
        }
    }

    // The distances of FEW rows from one query.
    void across(const float* const (&rows)[FEW], const float* own, float* out) const {
        const Distance distance = distance_;
        Sums sums[FEW];
        for (int r = 0; r < FEW; ++r) sums[r] = Distance::start();
        int i = 0;
        for (; i + LANES <= a_.dim; i += LANES)
            for (int r = 0; r < FEW; ++r) distance.add(sums[r], load(own + i), load(rows[r] + i));
        // Features that do not exist are 0 on both sides, and add nothing.
        if (const int left = a_.dim - i)
            for (int r = 0; r < FEW; ++r) distance.add(sums[r], load_first(own + i, left), load_first(rows[r] + i, left));
        for (int r = 0; r < FEW; ++r) out[r] = Distance::across(sums[r]);
    }

    const Arguments& a_;
    Keeper keeper_;
    DistanceRows<Distance> source_;
    DistanceBlocks blocks_;
    const Distance distance_;
    float upper_scale_, lower_scale_;
};
