// The scan of the rows: every product of codes is bounded where it is computed, and what reaches its
// query's threshold is kept.
#pragma once

#include <algorithm>
#include <cstring>

#include "arguments.h"
#include "keeper.h"
#include "memory.h"
#include "probed_lists.h"
#include "products.h"
#include "reservoir.h"
#include "rows.h"
#include "tables.h"

// Up to 4 vectors of queries as the product takes them, and what bounds their products.
template <class Code>
struct Block {
    int n;        // queries
    int vectors;  // of LANES queries; 0 where they are so few that each row is read for one at a time
    int32_t queries[MOST_VECTORS * LANES];
    typename Product<Code>::Packed* packed;
    float scale[MOST_VECTORS * LANES];
    float residual[MOST_VECTORS * LANES];
    float norm[MOST_VECTORS * LANES];
    // What bounds of rows on a grid lack, and the limits for these; and by how much that may be off.
    float limit[MOST_VECTORS * LANES];
    float offset[MOST_VECTORS * LANES];
    float margin[MOST_VECTORS * LANES];
    int correction[MOST_VECTORS * LANES];  // of scalars on a grid, which are not made signed

    // Compare with a limit from now on.
    void set_limit(int i, float least) {
        if (margin[i] != 0.0f && std::fabs(least) != HIGHEST) {
            const double own = double(least) - offset[i] - margin[i];
            least = static_cast<float>(own - (4.0 * UNIT * std::fabs(own) + FLOOR));
        }
        limit[i] = least;
    }
};

template <class Code>
class Scan {
   public:
    Scan(const Arguments& a, int part, float* limits, const ByteTables* tables)
        : a_(a),
          keeper_(a, part, limits),
          tables_(tables),
          source_(a),
          packed_dim_(steps_of(a.dim, Product<Code>::PER_STEP) * Product<Code>::PER_STEP) {}

    int64_t n_chunks() const { return (a_.n_rows + source_.most() - 1) / source_.most(); }

    // Make ready for the queries from `first` to `last`.
    bool prepare(Reservoir* reservoirs, int first, int last) {
        const int64_t vectors = (last - first + LANES - 1) / LANES;
        tail_ = allocate<Code>(packed_dim_ + 64);
        blocks_ = allocate<Block<Code>>(vectors + 1);
        packed_ = allocate<typename Product<Code>::Packed>(vectors * LANES * packed_dim_);
        if (!source_.prepare() || !tail_ || !blocks_ || !packed_) return false;
        if (a_.grid.steps && !origin_.make(a_.dim)) return false;
        if (tables_ && !(turned_ = allocate<uint8_t>(int64_t(a_.packed.parts) * TURNED_ROWS))) return false;
        keeper_.prepare(reservoirs, first, last);
        return true;
    }

    // Take the queries that are to meet the rows of a list, or all: n numbers, or n in a row from `first`.
    void take(const int32_t* queries, int first, int n, int64_t list) {
        if (a_.probes) source_.take_list(list);
        if (a_.grid.steps) origin_.take(a_.packed, a_.grid, list, a_.dim);
        auto* packed = packed_.get();
        n_blocks_ = 0;
        looks_up_ = tables_ && n <= LOOKING_UP;
        const bool few = !Product<Code>::TILES || n <= Product<Code>::MOST_ONE_BY_ONE || looks_up_;
        for (int i = 0; i < n;) {
            Block<Code>& block = blocks_[n_blocks_++];
            block.vectors = few ? 0 : std::min((n - i + LANES - 1) / LANES, MOST_VECTORS);
            block.n = std::min(n - i, std::max(block.vectors, 1) * LANES);
            for (int j = 0; j < block.n; ++j) block.queries[j] = queries ? queries[i + j] : first + i + j;
            block.packed = packed;
            fill(block);
            packed += int64_t(block.vectors) * LANES * packed_dim_;
            i += block.n;
        }
    }

    void chunk(int64_t number) {
        const int64_t first = number * source_.most();
        chunk(first, nullptr, static_cast<int>(std::min(source_.most(), a_.n_rows - first)));
    }

    void list(int64_t number) {
        visit_list(a_, number, source_.most(), [&](int64_t first, const int64_t* slots, int n) { chunk(first, slots, n); });
    }

   private:
    using Query = typename Product<Code>::Query;
    using Row = typename Product<Code>::Row;
    // Up to so many queries of a list look their rows up (measured).
    static constexpr int LOOKING_UP = 32;
    static constexpr int WIDE_ROWS = LANES == 16 ? 6 : 2;

    void chunk(int64_t first, const int64_t* slots, int n) {
        const Chunk<Code> c = source_.take(first, slots, n, n_blocks_ && blocks_[0].vectors, !looks_up_);
        if (looks_up_) {
            for (int b = 0; b < n_blocks_; ++b) refresh(blocks_[b]);
            for (int first = 0; first < c.n; first += TURNED_ROWS) look_up(c, first);
            return;
        }
        for (int b = 0; b < n_blocks_; ++b) {
            Block<Code>& block = blocks_[b];
            refresh(block);
            if (block.vectors == 0)
                dots(c, block);
            else if constexpr (Product<Code>::TILES)
                multiply_all(c, block);
        }
    }

    void multiply_all(const Chunk<Code>& c, Block<Code>& block) {
        switch (block.vectors) {
            case 1: tiles<12 * LANES / 16, 1>(c, block); break;
            case 2: tiles<8 * LANES / 16, 2>(c, block); break;
            case 3: tiles<8 * LANES / 16, 3>(c, block); break;
            default: tiles<WIDE_ROWS, 4>(c, block);
        }
    }

    static void pack(const Query* const* queries, Block<Code>& block, int dim) {
        switch (block.vectors) {
            case 4: pack_queries<Code, 4>(queries, block.n, dim, block.packed); break;
            case 3: pack_queries<Code, 3>(queries, block.n, dim, block.packed); break;
            case 2: pack_queries<Code, 2>(queries, block.n, dim, block.packed); break;
            case 1: pack_queries<Code, 1>(queries, block.n, dim, block.packed); break;
        }
    }

    void fill(Block<Code>& block) {
        const auto* codes = static_cast<const Query*>(a_.query_codes);
        const Query* queries[MOST_VECTORS * LANES];
        for (int i = 0; i < block.n; ++i) queries[i] = codes + int64_t(block.queries[i]) * a_.dim;
        if constexpr (Product<Code>::TILES) pack(queries, block, a_.dim);
        for (int i = 0; i < MOST_VECTORS * LANES; ++i) {
            const bool real = i < block.n;
            const int64_t q = real ? block.queries[i] : 0;
            block.scale[i] = real ? a_.query_terms[q] : 0.0f;
            block.residual[i] = real ? a_.query_terms[a_.n_queries + q] : 0.0f;
            block.norm[i] = real ? a_.query_terms[2 * int64_t(a_.n_queries) + q] : 0.0f;
            block.offset[i] = block.margin[i] = 0.0f;
            if (real && a_.grid.steps) {
                auto offset = origin_.of(a_.queries + q * a_.dim, a_.mean, a_.dim, a_.metric);
                if (looks_up_) offset.value += tables_->facts(q).base;
                block.offset[i] = static_cast<float>(offset.value);
                block.margin[i] = static_cast<float>(offset.margin + 2.0 * UNIT * std::fabs(offset.value)) + FLOOR;
            }
            block.set_limit(i, real ? keeper_.limit(q) : HIGHEST);
            if constexpr (!Rows<Code>::UNPACKS)
                block.correction[i] = real ? -Product<Code>::product(queries[i], a_.grid.scalars + a_.dim, a_.dim) : 0;
        }
    }

    // Take thresholds that other threads have found.
    void refresh(Block<Code>& block) {
        if (!keeper_.shares_limits()) return;
        for (int i = 0; i < block.n; ++i) block.set_limit(i, keeper_.shared_limit(block.queries[i]));
    }

    void keep(int64_t row, Block<Code>& block, int i, float upper, float lower) {
        if (i >= block.n) return;
        const int64_t q = block.queries[i];
        if (keeper_.keep(row, q, upper, lower)) block.set_limit(i, keeper_.limit(q));
    }

    // Bounds from above and below, given the one that was compared, by how much it may be off to either side,
    // and what the block says that it lacks.
    struct Bounds {
        alignas(64) float upper[LANES];
        alignas(64) float lower[LANES];

        Bounds(Floats bound, Floats error, Floats offset, Floats margin, bool on_grid) {
            Floats low = times_plus(error, all(-2.0f * (1.0f + 1e-6f)), bound);
            if (on_grid) {
                const Floats more = plus(bound, offset), less = plus(low, offset);
                bound = plus(more, times_plus(size(more), all(4.0f * float(UNIT)), margin));
                low = plus(less, times(times_plus(size(less), all(4.0f * float(UNIT)), margin), all(-1.0f)));
            }
            store(upper, bound);
            // Where that is NaN, nothing is known.
            store(lower, larger(low, all(LOWEST)));
        }

        static Floats size(Floats x) { return larger(x, times(x, all(-1.0f))); }
    };

    template <int ROWS, int VECTORS>
    void tiles(const Chunk<Code>& c, Block<Code>& block) {
        for (int first = 0; first < c.n; first += ROWS) {
            const Row* rows[ROWS];
            int corrections[ROWS];
            const int n = std::min(ROWS, c.n - first);
            if (!Rows<Code>::UNPACKS && &block == blocks_.get()) source_.prefetch_ahead(c, first, ROWS);
            for (int r = 0; r < ROWS; ++r) {
                const int place = first + std::min(r, n - 1);
                rows[r] = source_.features_of(c, place);
                corrections[r] = c.correction[place];
            }
            if constexpr (Product<Code>::PER_STEP > 1)
                if (a_.dim % Product<Code>::PER_STEP) copy_last(rows, ROWS);
            typename Product<Code>::Sums sums[ROWS][VECTORS];
            multiply<Code, ROWS, VECTORS>(rows, corrections, block.correction, block.packed, a_.dim, sums);
#pragma GCC unroll 16
            for (int v = 0; v < VECTORS; ++v) {
                const Floats scale = load(block.scale + v * LANES);
                const Floats residual = load(block.residual + v * LANES);
                const Floats norm = load(block.norm + v * LANES);
                const Floats limit = load(block.limit + v * LANES);
#pragma GCC unroll 16
                for (int r = 0; r < ROWS; ++r) {
                    const int place = first + std::min(r, n - 1);
                    Floats bound = times(Product<Code>::floats(sums[r][v]), scale);
                    bound = times_plus(bound, all(c.scale[place]), all(c.bias[place]));
                    bound = times_plus(residual, all(c.residual[place]), bound);
                    bound = times_plus(norm, all(c.norm[place]), bound);
                    const unsigned reached = not_below(bound, limit);
                    if (__builtin_expect(reached != 0, 0) && r < n && !keeper_.hidden(c.row(place)))
                        keep_all(c, place, block, v, reached, bound);
                }
            }
        }
    }

    __attribute__((noinline)) void keep_all(const Chunk<Code>& c, int r, Block<Code>& block, int v,
                                            unsigned reached, Floats bound) {
        const int first = v * LANES;
        // Limits rise while rows of a tile are kept.
        reached &= not_below(bound, load(block.limit + first));
        if (!reached) return;
        Floats error = times(load(block.residual + first), all(c.residual[r]));
        error = times_plus(load(block.norm + first), all(c.norm[r]), error);
        error = plus(error, all(c.rest[r] + FLOOR));
        const Bounds bounds(bound, error, load(block.offset + first), load(block.margin + first), a_.grid.steps);
        for (; reached; reached &= reached - 1) {
            const int lane = __builtin_ctz(reached);
            keep(c.row(r), block, first + lane, bounds.upper[lane], bounds.lower[lane]);
        }
    }

    // The last step of the last row would read past the end of the codes.
    void copy_last(const Code** rows, int n) {
        const Code* last = source_.last();
        for (int r = 0; r < n; ++r) {
            if (rows[r] != last) continue;
            std::memcpy(tail_.get(), last, a_.dim * sizeof(Code));
            rows[r] = tail_.get();
        }
    }

    void dots(const Chunk<Code>& c, Block<Code>& block) {
        for (int i = 0; i < block.n; ++i) {
            const Query* query = static_cast<const Query*>(a_.query_codes) + int64_t(block.queries[i]) * a_.dim;
            int correction;
            if constexpr (Rows<Code>::UNPACKS)
                correction = Product<Code>::query_correction(query, a_.dim);
            else
                correction = block.correction[i];
            alignas(64) float products[LANES];
            const Floats scale = all(block.scale[i]), residual = all(block.residual[i]);
            const Floats norm = all(block.norm[i]);
            for (int first = 0; first < c.n; first += LANES) {
                const int n = std::min(LANES, c.n - first);
                if (i == 0) source_.prefetch_ahead(c, first, LANES);
                for (int r = 0; r < LANES; r += FEW) {
                    const Code* rows[FEW];
                    for (int i = 0; i < FEW; ++i) rows[i] = source_.codes_of(c, first + std::min(r + i, n - 1));
                    Product<Code>::dots(rows, query, a_.dim, correction, products + r);
                }
                Floats bound = times(load(products), scale);
                bound = times_plus(bound, load_first(c.scale + first, n), load_first(c.bias + first, n));
                Floats error = times(residual, load_first(c.residual + first, n));
                error = times_plus(norm, load_first(c.norm + first, n), error);
                keep_rows(c, first, n, block, i, plus(bound, error), error);
            }
        }
    }

    // Rows of parts, 64 from `first` on, by what tables say of their codes.
    void look_up(const Chunk<Code>& c, int first) {
        const uint8_t* rows[TURNED_ROWS];
        for (int r = 0; r < TURNED_ROWS; ++r) rows[r] = source_.packed(c, std::min(first + r, c.n - 1));
        turn(rows, a_.packed.parts, turned_.get());
        source_.prefetch_packed(c, first + TURNED_ROWS, TURNED_ROWS);
        for (int b = 0; b < n_blocks_; ++b)
            for (int i = 0; i < blocks_[b].n; ++i) look_up(c, first, blocks_[b], i);
    }

    void look_up(const Chunk<Code>& c, int first, Block<Code>& block, int i) {
        const ByteTables::Facts& facts = tables_->facts(block.queries[i]);
        alignas(64) uint16_t sums[TURNED_ROWS];
        add_parts(turned_.get(), tables_->of(block.queries[i]), a_.packed.parts, sums);
        const Floats step = all(facts.step), per_norm = all(facts.norm), every = all(facts.error);
        for (int r = first; r < std::min(first + TURNED_ROWS, c.n); r += LANES) {
            const int n = std::min(LANES, c.n - r);
            const Floats error = times_plus(per_norm, load_first(c.norm + r, n), every);
            Floats bound = times_plus(load_shorts(sums + r - first), step, load_first(c.bias + r, n));
            bound = plus(bound, error);
            keep_rows(c, r, n, block, i, bound, error);
        }
    }

    // Keep those of n rows whose bounds, less what the rest of the error adds, reach the limit of a query.
    void keep_rows(const Chunk<Code>& c, int first, int n, Block<Code>& block, int i, Floats bound, Floats error) {
        unsigned reached = not_below(bound, all(block.limit[i])) & ((1u << n) - 1);
        if (!reached) return;
        error = plus(error, plus(load_first(c.rest + first, n), all(FLOOR)));
        const Bounds bounds(bound, error, all(block.offset[i]), all(block.margin[i]), a_.grid.steps);
        alignas(64) float compared[LANES];
        store(compared, bound);
        for (; reached; reached &= reached - 1) {
            const int r = __builtin_ctz(reached);
            if (!(compared[r] < block.limit[i]) && !keeper_.hidden(c.row(first + r)))
                keep(c.row(first + r), block, i, bounds.upper[r], bounds.lower[r]);
        }
    }

    const Arguments& a_;
    Keeper keeper_;
    const ByteTables* tables_;
    bool looks_up_ = false;
    Rows<Code> source_;
    Origin origin_;
    const int packed_dim_;
    int n_blocks_ = 0;
    Memory<Code> tail_;
    Memory<uint8_t> turned_;
    Memory<Block<Code>> blocks_;
    Memory<typename Product<Code>::Packed> packed_;
};
