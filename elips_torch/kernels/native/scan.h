// The scan of the rows: every product of codes is bounded where it is computed, and what reaches its
// query's threshold is kept.
#pragma once

#include <algorithm>
#include <cstring>

#include "arguments.h"
#include "memory.h"
#include "products.h"
#include "reservoir.h"

// Rows at a time: for many queries as many as stay in cache, for few long stretches of memory.
constexpr int64_t CHUNK_BYTES = 96 * 1024, LONG_CHUNK_BYTES = 768 * 1024;
constexpr int64_t MOST_CHUNK_ROWS = 12 * 1024;
constexpr int MOST_VECTORS = 4;
constexpr int FEW_QUERIES = 4;

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
    float limit[MOST_VECTORS * LANES];
};

// Rows of a chunk: what the bounds need of each, one array a term.
struct Chunk {
    int64_t first;         // the place of the first codes; those of the others follow
    const int64_t* slots;  // rows, from the chunk's first on; null where these are the places
    bool scattered;        // the rows are the places, which do not follow each other
    int n;
    float* scale;
    float* residual;
    float* norm;
    float* bias;  // with what every bound of the row contains
    int* correction;
    const float* unpacked;  // (n, D), or null

    int64_t row(int r) const { return slots ? slots[r] : first + r; }
    int64_t place(int r) const { return scattered ? slots[r] : first + r; }
};

// The queries of each list, ascending.
struct ListQueries {
    Memory<int64_t> starts;  // (L + 1,)
    Memory<int32_t> queries;

    bool fill(const Arguments& a) {
        const int64_t pairs = int64_t(a.n_queries) * a.n_probes;
        starts = allocate<int64_t>(a.n_lists + 1);
        queries = allocate<int32_t>(pairs);
        if (!starts || !queries) return false;
        std::fill(starts.get(), starts.get() + a.n_lists + 1, 0);
        for (int64_t i = 0; i < pairs; ++i)
            if (is_list(a, a.probes[i])) ++starts[a.probes[i] + 1];
        for (int64_t list = 0; list < a.n_lists; ++list) starts[list + 1] += starts[list];
        for (int64_t i = pairs - 1; i >= 0; --i)
            if (is_list(a, a.probes[i])) queries[--starts[a.probes[i] + 1]] = static_cast<int32_t>(i / a.n_probes);
        // Filled from behind, each start has come to be that of the list before.
        for (int64_t list = 0; list < a.n_lists; ++list) starts[list] = starts[list + 1];
        starts[a.n_lists] = std::count_if(a.probes, a.probes + pairs, [&](int64_t list) { return is_list(a, list); });
        return true;
    }

    static bool is_list(const Arguments& a, int64_t list) { return 0 <= list && list < a.n_lists; }
};

template <class Code>
class Scan {
   public:
    Scan(const Arguments& a, int part, float* limits)
        : a_(a),
          limits_(limits),
          chunk_rows_(std::clamp<int64_t>((a.n_queries <= FEW_QUERIES ? LONG_CHUNK_BYTES : CHUNK_BYTES) /
                                              (a.dim * int64_t(sizeof(Code))) / ROWS_STEP * ROWS_STEP,
                                          ROWS_STEP, MOST_CHUNK_ROWS)),
          packed_dim_(steps_of(a.dim, Product<Code>::PER_STEP) * Product<Code>::PER_STEP) {
        const int64_t q = a.n_queries, c = a.capacity + SPARE;
        rows_ = static_cast<int32_t*>(a.memory) + part * q * c;
        upper_ = static_cast<float*>(a.memory) + (a.n_parts + part) * q * c;
        lower_ = static_cast<float*>(a.memory) + (2 * a.n_parts + part) * q * c;
    }

    int64_t n_chunks() const { return (a_.n_rows + chunk_rows_ - 1) / chunk_rows_; }

    // Make ready for the queries from `first` to `last`.
    bool prepare(Reservoir* reservoirs, int first, int last) {
        reservoirs_ = reservoirs;
        const int64_t vectors = (last - first + LANES - 1) / LANES;
        terms_ = allocate<float>(4 * chunk_rows_);
        corrections_ = allocate<int>(chunk_rows_ + MOST_ROWS);
        if (a_.packed.packing) {
            unpacked_ = allocate<float>(chunk_rows_ * a_.dim);
            if (!unpacked_) return false;
        }
        tail_ = allocate<Code>(packed_dim_ + 64);
        blocks_ = allocate<Block<Code>>(vectors + 1);
        packed_ = allocate<typename Product<Code>::Packed>(vectors * LANES * packed_dim_);
        if (!terms_ || !corrections_ || !tail_ || !blocks_ || !packed_) return false;
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
            if (!a_.usable[q]) r.fail();
        }
        return true;
    }

    // Take the queries that are to meet the rows that follow: n numbers, or n in a row from `first`.
    void take(const int32_t* queries, int first, int n) {
        auto* packed = packed_.get();
        n_blocks_ = 0;
        const bool few = n <= FEW_QUERIES;
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
        const int64_t first = number * chunk_rows_;
        chunk(first, nullptr, static_cast<int>(std::min(chunk_rows_, a_.n_rows - first)));
    }

    void list(int64_t number) {
        const int64_t start = a_.list_starts[number], size = a_.list_sizes[number];
        // Nobody may change lists while they are searched; where somebody has, most wrong slots are seen here.
        if (start < 0 || size < 0 || start + size > a_.n_slots) return;
        for (int64_t slot = start; slot < start + size; ++slot)
            if (a_.slots[slot] < 0 || a_.slots[slot] >= a_.n_rows) return;
        for (int64_t done = 0; done < size; done += chunk_rows_)
            chunk(start + done, a_.slots + start + done, static_cast<int>(std::min(chunk_rows_, size - done)));
    }

   private:
    static constexpr int WIDE_ROWS = LANES == 16 ? 6 : 2;
    static constexpr int MOST_ROWS = 12;
    static constexpr int ROWS_AHEAD = 8;
    static constexpr int64_t ROWS_STEP = 48;  // a multiple of every tile's rows

    void chunk(int64_t first, const int64_t* slots, int n) {
        Chunk c;
        c.first = first;
        c.slots = slots;
        c.scattered = slots && !a_.codes_in_slots;
        c.n = n;
        c.scale = terms_.get();
        c.residual = c.scale + chunk_rows_;
        c.norm = c.residual + chunk_rows_;
        c.bias = c.norm + chunk_rows_;
        c.correction = corrections_.get();
        c.unpacked = nullptr;
        if (a_.packed.packing) unpack_rows(c);
        else if (c.scattered) {
            // Rows of a list lie anywhere.
            for (int r = 0; r < n; ++r) _mm_prefetch(reinterpret_cast<const char*>(a_.terms + 4 * slots[r]), _MM_HINT_T0);
            for (int r = 0; r < std::min(n, ROWS_AHEAD); ++r) prefetch_row(slots[r]);
            take_terms(c, [&](int r) { return a_.terms + 4 * slots[r]; });
        } else
            take_terms(c, [&](int r) { return a_.terms + 4 * (first + r); });
        if (n_blocks_ && blocks_[0].vectors)
            for (int r = 0; r < n; ++r) {
                if (c.scattered && r + ROWS_AHEAD < n) prefetch_row(slots[r + ROWS_AHEAD]);
                c.correction[r] = Product<Code>::correction(codes_of(c, r), a_.dim);
            }
        for (int b = 0; b < n_blocks_; ++b) {
            Block<Code>& block = blocks_[b];
            refresh(block);
            switch (block.vectors) {
                case 0: dots(c, block); break;
                case 1: tiles<12 * LANES / 16, 1>(c, block); break;
                case 2: tiles<8 * LANES / 16, 2>(c, block); break;
                case 3: tiles<8 * LANES / 16, 3>(c, block); break;
                default: tiles<WIDE_ROWS, 4>(c, block);
            }
        }
    }

    void prefetch_row(int64_t number) const {
        const char* codes = reinterpret_cast<const char*>(row(number));
        for (int64_t i = 0; i < a_.dim * int64_t(sizeof(Code)); i += 64) _mm_prefetch(codes + i, _MM_HINT_T0);
    }

    void prefetch_packed(int64_t number) const {
        const char* codes = reinterpret_cast<const char*>(a_.packed.codes + number * a_.packed.code_size);
        for (int i = 0; i < a_.packed.code_size; i += 64) _mm_prefetch(codes + i, _MM_HINT_T0);
    }

    template <class Place>
    void take_terms(Chunk& c, Place terms_of) {
        const float slack = a_.slack;
        float *scale = c.scale, *residual = c.residual, *norm = c.norm, *bias = c.bias;
#pragma omp simd
        for (int r = 0; r < c.n; ++r) {
            const float* terms = terms_of(r);
            scale[r] = terms[0];
            residual[r] = terms[1];
            norm[r] = terms[2];
            // Without slack an infinite norm would make this NaN.
            const float rest = slack == 0.0f ? 0.0f : terms[2] * terms[2] * slack;
            bias[r] = terms[3] + (rest + FLOOR);
        }
    }

    const Code* row(int64_t number) const {
        return static_cast<const Code*>(a_.codes) + number * a_.dim;
    }

    const Code* codes_of(const Chunk& c, int r) const {
        if (c.unpacked) return reinterpret_cast<const Code*>(c.unpacked) + int64_t(r) * a_.dim;
        return row(c.place(r));
    }

    // The rows' vectors and the terms of their bounds, as `plane.plain_plane` makes them.
    void unpack_rows(Chunk& c) {
        const double slack = (a_.dim + 8) * UNIT, lost = std::sqrt(double(a_.dim)) / (1ull << 63);
        for (int r = 0; r < c.n; ++r) {
            if (r + ROWS_AHEAD < c.n) prefetch_packed(c.row(r + ROWS_AHEAD));
            float* vector = unpacked_.get() + int64_t(r) * a_.dim;
            unpack(a_.packed, c.row(r), a_.dim, vector);
            const double square = square_of(vector, a_.dim);
            const double norm = std::sqrt(square);
            const bool known = norm < double(1ull << 60);
            c.scale[r] = 1.0f;
            c.residual[r] = 0.0f;
            c.norm[r] = known ? static_cast<float>(norm * (1.0 + slack) + lost) : HIGHEST;
            c.bias[r] = FLOOR;
            if (a_.metric == COSINE) {
                const bool bounded = norm > 1.0 / (1ull << 50) || square == 0.0;
                c.scale[r] = norm > 0.0 ? static_cast<float>(1.0 / norm) : 1.0f;
                c.residual[r] = static_cast<float>(2.0 * slack);
                c.norm[r] = known && bounded ? static_cast<float>(1.0 + 2.0 * slack) : HIGHEST;
            } else if (a_.metric == L2 && known) {
                c.bias[r] = static_cast<float>(-0.5 * square) + (c.norm[r] * c.norm[r] * a_.slack + FLOOR);
            }
        }
        c.unpacked = unpacked_.get();
    }

    void fill(Block<Code>& block) {
        const auto* codes = static_cast<const Code*>(a_.query_codes);
        const Code* queries[MOST_VECTORS * LANES];
        for (int i = 0; i < block.n; ++i) queries[i] = codes + int64_t(block.queries[i]) * a_.dim;
        switch (block.vectors) {
            case 4: pack_queries<Code, 4>(queries, block.n, a_.dim, block.packed); break;
            case 3: pack_queries<Code, 3>(queries, block.n, a_.dim, block.packed); break;
            case 2: pack_queries<Code, 2>(queries, block.n, a_.dim, block.packed); break;
            case 1: pack_queries<Code, 1>(queries, block.n, a_.dim, block.packed); break;
        }
        for (int i = 0; i < MOST_VECTORS * LANES; ++i) {
            const bool real = i < block.n;
            const int64_t q = real ? block.queries[i] : 0;
            block.scale[i] = real ? a_.query_terms[q] : 0.0f;
            block.residual[i] = real ? a_.query_terms[a_.n_queries + q] : 0.0f;
            block.norm[i] = real ? a_.query_terms[2 * int64_t(a_.n_queries) + q] : 0.0f;
            block.limit[i] = real ? reservoirs_[q].limit : HIGHEST;
        }
    }

    // Take thresholds that other threads have found.
    void refresh(Block<Code>& block) {
        if (!limits_) return;
        for (int i = 0; i < block.n; ++i) {
            float other;
            __atomic_load(limits_ + block.queries[i], &other, __ATOMIC_RELAXED);
            Reservoir& r = reservoirs_[block.queries[i]];
            if (other > r.limit) block.limit[i] = r.limit = other;
        }
    }

    bool sees(int64_t query, int64_t row) const {
        if (a_.mask && a_.mask_rows && !a_.mask[a_.mask_rows[query] * a_.mask_stride + row * a_.mask_step])
            return false;
        const int64_t* out = a_.exclude + query * a_.n_excluded;
        return !std::binary_search(out, out + a_.n_excluded, row);
    }

    void keep(const Chunk& c, int r, Block<Code>& block, int i, float upper) {
        if (i >= block.n) return;
        const int64_t q = block.queries[i], row = c.row(r);
        if (!sees(q, name_of(a_, row))) return;
        const float rest = a_.slack == 0.0f ? 0.0f : c.norm[r] * c.norm[r] * a_.slack;
        const float error =
            (block.residual[i] * c.residual[r] + block.norm[i] * c.norm[r] + (rest + FLOOR)) * (1.0f + 1e-6f);
        float lower = upper - 2.0f * error;
        if (!(lower > LOWEST)) lower = LOWEST;
        Reservoir& reservoir = reservoirs_[q];
        if (reservoir.failed) return;
        if (reservoir.push(static_cast<int32_t>(row), upper, lower)) {
            block.limit[i] = reservoir.limit;
            if (limits_) {
                float other;
                __atomic_load(limits_ + q, &other, __ATOMIC_RELAXED);
                if (reservoir.limit > other) __atomic_store(limits_ + q, &reservoir.limit, __ATOMIC_RELAXED);
            }
        }
    }

    bool hidden(int64_t row) const {
        return a_.mask && !a_.mask_rows && !a_.mask[name_of(a_, row) * a_.mask_step];
    }

    template <int ROWS, int VECTORS>
    void tiles(const Chunk& c, Block<Code>& block) {
        for (int first = 0; first < c.n; first += ROWS) {
            const Code* rows[ROWS];
            int corrections[ROWS];
            const int n = std::min(ROWS, c.n - first);
            for (int r = 0; r < ROWS; ++r) {
                const int place = first + std::min(r, n - 1);
                rows[r] = codes_of(c, place);
                corrections[r] = c.correction[place];
            }
            if (a_.dim % Product<Code>::PER_STEP) copy_last(rows, ROWS);
            typename Product<Code>::Sums sums[ROWS][VECTORS];
            multiply<Code, ROWS, VECTORS>(rows, corrections, block.packed, a_.dim, sums);
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
                    if (__builtin_expect(reached != 0, 0) && r < n && !hidden(c.row(place)))
                        keep_all(c, place, block, v, reached, bound);
                }
            }
        }
    }

    __attribute__((noinline)) void keep_all(const Chunk& c, int r, Block<Code>& block, int v,
                                            unsigned reached, Floats bound) {
        alignas(64) float bounds[LANES];
        store(bounds, bound);
        for (; reached; reached &= reached - 1) {
            const int lane = __builtin_ctz(reached);
            const int i = v * LANES + lane;
            if (!(bounds[lane] < block.limit[i])) keep(c, r, block, i, bounds[lane]);
        }
    }

    // The last step of the last row would read past the end of the codes.
    void copy_last(const Code** rows, int n) {
        const Code* last = row((a_.codes_in_slots ? a_.n_slots : a_.n_rows) - 1);
        for (int r = 0; r < n; ++r) {
            if (rows[r] != last) continue;
            std::memcpy(tail_.get(), last, a_.dim * sizeof(Code));
            rows[r] = tail_.get();
        }
    }

    void dots(const Chunk& c, Block<Code>& block) {
        for (int i = 0; i < block.n; ++i) {
            const Code* query = static_cast<const Code*>(a_.query_codes) + int64_t(block.queries[i]) * a_.dim;
            const int correction = Product<Code>::query_correction(query, a_.dim);
            alignas(64) float products[LANES];
            const Floats scale = all(block.scale[i]), residual = all(block.residual[i]);
            const Floats norm = all(block.norm[i]);
            for (int first = 0; first < c.n; first += LANES) {
                const int n = std::min(LANES, c.n - first);
                if (c.scattered && !c.unpacked && i == 0)
                    for (int r = first + ROWS_AHEAD; r < std::min(first + ROWS_AHEAD + LANES, c.n); ++r)
                        prefetch_row(c.slots[r]);
                for (int r = 0; r < LANES; r += FEW) {
                    const Code* rows[FEW];
                    for (int i = 0; i < FEW; ++i) rows[i] = codes_of(c, first + std::min(r + i, n - 1));
                    Product<Code>::dots(rows, query, a_.dim, correction, products + r);
                }
                Floats bound = times(load(products), scale);
                bound = times_plus(bound, load_first(c.scale + first, n), load_first(c.bias + first, n));
                bound = times_plus(residual, load_first(c.residual + first, n), bound);
                bound = times_plus(norm, load_first(c.norm + first, n), bound);
                unsigned reached = not_below(bound, all(block.limit[i]));
                reached &= (1u << n) - 1;
                if (!reached) continue;
                alignas(64) float bounds[LANES];
                store(bounds, bound);
                for (; reached; reached &= reached - 1) {
                    const int r = __builtin_ctz(reached);
                    if (!(bounds[r] < block.limit[i]) && !hidden(c.row(first + r)))
                        keep(c, first + r, block, i, bounds[r]);
                }
            }
        }
    }

    const Arguments& a_;
    float* limits_;
    const int64_t chunk_rows_;
    const int packed_dim_;
    int32_t* rows_;
    float* upper_;
    float* lower_;
    int n_blocks_ = 0;
    Reservoir* reservoirs_ = nullptr;
    Memory<float> terms_, unpacked_;
    Memory<int> corrections_;
    Memory<Code> tail_;
    Memory<Block<Code>> blocks_;
    Memory<typename Product<Code>::Packed> packed_;
};
