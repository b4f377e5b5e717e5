// Exact search in a plane of codes: one pass over the rows, survivors in registers' reach.
//
// Every product of codes is bounded from above where it is computed and compared with its query's
// threshold; the few that reach it are kept with both bounds. When a query has kept enough, the k-th
// best lower bound becomes its threshold, and what lies below it is dropped. In the end the survivors
// are scored by the definition and sorted. Thresholds only decide how much is kept, never the result.

#include <omp.h>

#include <cstdlib>
#include <cstring>
#include <memory>

#include "assign.h"
#include "coding.h"
#include "outcome.h"
#include "products.h"
#include "reservoir.h"
#include "rescore.h"
#include "unpack.h"

extern "C" {

// All pointers are to contiguous memory that outlives the call.
struct Arguments {
    // The plane: (N, D) codes, float32 or int8, and (N, 4) scale, residual, norm and bias. Where rows are
    // packed, codes are the vectors that are unpacked, and terms are made of them.
    const void* codes;
    const float* terms;
    const int64_t* names;  // (N,), what callers call each row; null where that is its number
    int64_t n_rows;
    // Inverted lists: null, or (L,) first slot and number of slots of each; (S,) the row in each slot; and
    // (Q, P) lists that each query searches, -1 for none. Without them all rows are searched.
    const int64_t* list_starts;
    const int64_t* list_sizes;
    const int64_t* slots;
    const int64_t* probes;
    int64_t n_lists;
    int64_t n_slots;
    int64_t n_probes;
    // The queries (Q, D) as callers have them, of which codes and what follows are made here; or null, and
    // the coded queries: (Q, D) codes; (3, Q) scale and factors of residual and norm.
    const void* source;
    const float* mean;  // (D,), as Coding has it, and two numbers more
    double rounded;
    double largest;
    const void* query_codes;
    const float* query_terms;
    const double* rounding;  // (Q,)
    const double* offsets;   // (Q,)
    const uint8_t* usable;   // (Q,)
    // What a query may see, by the rows' names: null for everything, else bytes (N,) or, by rows of a matrix, (*, N); and
    // (Q, M) row numbers to leave out, ascending.
    const uint8_t* mask;
    const int64_t* mask_rows;  // (Q,), which row of the mask; null where all share one
    int64_t mask_stride;       // bytes between rows of the mask
    int64_t mask_step;         // bytes between the entries of a row
    const int64_t* exclude;
    int64_t n_excluded;
    // The vectors: (N, D) float32, float16 or bfloat16; (Q, D) float64; order of ties by name, or null.
    const void* vectors;
    Packed packed;
    const double* queries;
    const int64_t* ranks;
    void* memory;  // (3, T, Q, C + SPARE) numbers of four bytes
    // Results: (Q, K) each; and (2, Q), the status of each query and how many rows survived, whose numbers
    // lie in the first reservoir of the query at the beginning of the memory.
    float* scores;
    int64_t* found;
    int32_t* status;
    float slack;
    int32_t dim;
    int32_t n_queries;
    int32_t k;
    int32_t capacity;
    int32_t n_threads;
    int32_t n_parts;  // T: 1 where threads share the queries among them, else the number of threads
    int32_t metric;
    int32_t code_type;    // 0 float32, 1 int8
    int32_t vector_type;  // 0 float32, 1 float16, 2 bfloat16
    int32_t source_type;  // these, or 3 float64
    int32_t is_exact;     // similarities of the codes are those of the vectors
};

enum Status : int32_t { CERTIFIED = 0, UNCERTIFIED = 1, UNSURE = 2 };
}

static inline int64_t name_of(const Arguments& a, int64_t row) { return a.names ? a.names[row] : row; }

namespace {

// Rows at a time: for many queries as many as stay in cache, for few long stretches of memory.
constexpr int64_t CHUNK_BYTES = 96 * 1024, LONG_CHUNK_BYTES = 768 * 1024;
constexpr int64_t MOST_CHUNK_ROWS = 12 * 1024;
constexpr int MOST_VECTORS = 4;
constexpr int FEW_QUERIES = 4;

struct Free {
    void operator()(void* p) const { std::free(p); }
};
template <class T>
using Memory = std::unique_ptr<T[], Free>;

template <class T>
Memory<T> allocate(int64_t n) {
    const size_t bytes = (static_cast<size_t>(n) * sizeof(T) + 127) / 64 * 64;
    return Memory<T>(static_cast<T*>(std::aligned_alloc(64, bytes)));
}

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
    int64_t first;
    const int64_t* slots;  // rows, from the chunk's first on; null where they follow each other
    int n;
    float* scale;
    float* residual;
    float* norm;
    float* bias;  // with what every bound of the row contains
    int* correction;
    const float* unpacked;  // (n, D), or null

    int64_t row(int r) const { return slots ? slots[r] : first + r; }
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
            if (a.probes[i] >= 0) ++starts[a.probes[i] + 1];
        for (int64_t list = 0; list < a.n_lists; ++list) starts[list + 1] += starts[list];
        for (int64_t i = pairs - 1; i >= 0; --i)
            if (a.probes[i] >= 0) queries[--starts[a.probes[i] + 1]] = static_cast<int32_t>(i / a.n_probes);
        // Filled from behind, each start has come to be that of the list before.
        for (int64_t list = 0; list < a.n_lists; ++list) starts[list] = starts[list + 1];
        starts[a.n_lists] = std::count_if(a.probes, a.probes + pairs, [](int64_t list) { return list >= 0; });
        return true;
    }
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
        // Another thread may be changing the lists: what is read may be wrong then, but not outside.
        if (start < 0 || size < 0 || start + size > a_.n_slots) return;
        for (int64_t slot = start; slot < start + size; ++slot)
            if (a_.slots[slot] < 0 || a_.slots[slot] >= a_.n_rows) return;
        for (int64_t done = 0; done < size; done += chunk_rows_)
            chunk(0, a_.slots + start + done,
                  static_cast<int>(std::min(chunk_rows_, size - done)));
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
        c.n = n;
        c.scale = terms_.get();
        c.residual = c.scale + chunk_rows_;
        c.norm = c.residual + chunk_rows_;
        c.bias = c.norm + chunk_rows_;
        c.correction = corrections_.get();
        c.unpacked = nullptr;
        if (a_.packed.packing) unpack_rows(c);
        else if (slots) {
            // Rows of a list lie anywhere.
            for (int r = 0; r < n; ++r) _mm_prefetch(reinterpret_cast<const char*>(a_.terms + 4 * slots[r]), _MM_HINT_T0);
            for (int r = 0; r < std::min(n, ROWS_AHEAD); ++r) prefetch_row(slots[r]);
            take_terms(c, [&](int r) { return a_.terms + 4 * slots[r]; });
        } else
            take_terms(c, [&](int r) { return a_.terms + 4 * (first + r); });
        if (n_blocks_ && blocks_[0].vectors)
            for (int r = 0; r < n; ++r) {
                if (slots && r + ROWS_AHEAD < n) prefetch_row(slots[r + ROWS_AHEAD]);
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
        return row(c.row(r));
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
        const Code* last = row(a_.n_rows - 1);
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

int code_queries(const Coding& c) {
    if (c.code_type != 0 && c.code_type != 1) return UNKNOWN_TYPE;
    double mean_length = 0.0;
    for (int i = 0; i < c.dim; ++i) mean_length += double(c.mean[i]) * c.mean[i];
    mean_length = std::sqrt(mean_length);
    bool ready = true;
#pragma omp parallel num_threads(c.n_threads) if (c.n_threads > 1 && c.n_queries > 16)
    {
        Memory<double> wide = allocate<double>(c.dim);
        if (!wide) {
#pragma omp atomic write
            ready = false;
        }
#pragma omp for
        for (int64_t q = 0; q < c.n_queries; ++q) {
            if (!wide) continue;
            if (c.code_type == 0)
                code_query<float>(c, q, mean_length, wide.get());
            else
                code_query<int8_t>(c, q, mean_length, wide.get());
        }
    }
    return ready ? DONE : NO_MEMORY;
}

// Queries as float64 and as codes, where callers give them as they are.
class CodedHere {
   public:
    // Returns as elips_search does.
    int make(Arguments& a) {
        const int64_t q = a.n_queries, n = q * a.dim;
        wide_ = allocate<double>(n + 2 * q);
        codes_ = allocate<float>(n);
        terms_ = allocate<float>(3 * q);
        usable_ = allocate<uint8_t>(q);
        if (!wide_ || !codes_ || !terms_ || !usable_) return NO_MEMORY;
        double* wide = wide_.get();
        switch (a.source_type) {
            case 0: widen<float>(a.source, n, wide); break;
            case 1: widen<Half>(a.source, n, wide); break;
            case 2: widen<BFloat>(a.source, n, wide); break;
            case 3: widen<double>(a.source, n, wide); break;
            default: return UNKNOWN_TYPE;
        }
        Coding c;
        c.queries = wide;
        c.mean = a.mean;
        c.codes = codes_.get();
        c.terms = terms_.get();
        c.rounding = wide + n;
        c.offsets = c.rounding + q;
        c.usable = usable_.get();
        c.rounded = a.rounded;
        c.largest = a.largest;
        c.dim = a.dim;
        c.n_queries = a.n_queries;
        c.metric = a.metric;
        c.code_type = a.code_type;
        c.n_threads = a.n_threads;
        a.queries = wide;
        a.query_codes = c.codes;
        a.query_terms = c.terms;
        a.rounding = c.rounding;
        a.offsets = c.offsets;
        a.usable = c.usable;
        return code_queries(c);
    }

   private:
    template <class Value>
    static void widen(const void* source, int64_t n, double* out) {
        const Value* values = static_cast<const Value*>(source);
        for (int64_t i = 0; i < n; ++i) out[i] = wide(values[i]);
    }

    Memory<double> wide_;
    Memory<float> codes_, terms_;
    Memory<uint8_t> usable_;
};

// Chunks in an order that meets rows from everywhere early, whatever their order is.
int64_t stride_of(int64_t n) {
    int64_t stride = static_cast<int64_t>(n * 0.6180339887498949) | 1;
    auto gcd = [](int64_t x, int64_t y) {
        while (y) std::swap(x %= y, y);
        return x;
    };
    while (n > 1 && gcd(stride, n) != 1) ++stride;
    return stride;
}

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
        const bool descends = a_.metric != L2;
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
        if (a_.packed.packing) return;
        const char* p = reinterpret_cast<const char*>(static_cast<const Value*>(a_.vectors) + row * a_.dim);
        for (int64_t i = 0; i < int64_t(a_.dim) * int64_t(sizeof(Value)); i += 64) __builtin_prefetch(p + i, 0, 2);
    }

    Score score_of(const double* query, double length, int64_t row) {
        if (a_.packed.packing) {
            unpack(a_.packed, row, a_.dim, unpacked_.get());
            return score(a_.metric, query, length, unpacked_.get(), a_.dim);
        }
        const Value* vector = static_cast<const Value*>(a_.vectors) + row * a_.dim;
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

template <class Value>
bool rank(const Arguments& a, Reservoir* reservoirs) {
    bool ready = true;
#pragma omp parallel num_threads(a.n_threads) if (a.n_threads > 1 && a.n_queries > 1)
    {
        Ranking<Value> ranking(a);
        if (!ranking.is_ready()) {
#pragma omp atomic write
            ready = false;
        }
#pragma omp for schedule(dynamic, 4)
        for (int64_t q = 0; q < a.n_queries; ++q)
            if (ranking.is_ready()) ranking.query(q, reservoirs);
    }
    return ready;
}

template <class Code>
bool scan(const Arguments& a, Reservoir* reservoirs, float* limits) {
    ListQueries lists;
    if (a.probes && !lists.fill(a)) return false;
    bool ready = true;
    int64_t next = 0;
#pragma omp parallel num_threads(a.n_threads) if (a.n_threads > 1)
    {
        const int thread = omp_get_thread_num(), n_threads = omp_get_num_threads();
        const bool splits_rows = a.n_parts > 1;
        int first = 0, last = a.n_queries;
        if (!splits_rows) {
            // Whole blocks of queries, as evenly as they go.
            const int64_t wide = a.probes ? 1 : MOST_VECTORS * LANES, blocks = (a.n_queries + wide - 1) / wide;
            first = static_cast<int>(std::min<int64_t>(a.n_queries, blocks * thread / n_threads * wide));
            last = static_cast<int>(std::min<int64_t>(a.n_queries, blocks * (thread + 1) / n_threads * wide));
        }
        const int part = splits_rows ? thread : 0;
        Scan<Code> work(a, part, limits);
        const bool mine = first < last;
        const bool prepared = !mine || work.prepare(reservoirs + int64_t(part) * a.n_queries, first, last);
        if (!prepared) {
#pragma omp atomic write
            ready = false;
        }
        const int64_t n = a.probes ? a.n_lists : work.n_chunks(), stride = stride_of(n);
        if (prepared && mine && !a.probes) work.take(nullptr, first, last - first);
        for (int64_t i = 0; prepared && mine; ++i) {
            int64_t number = i;
            if (splits_rows) {
#pragma omp atomic capture
                number = next++;
            }
            if (number >= n) break;
            if (!a.probes) {
                work.chunk(static_cast<int64_t>((static_cast<__int128>(number) * stride) % n));
                continue;
            }
            const int32_t* begin = lists.queries.get() + lists.starts[number];
            const int32_t* end = lists.queries.get() + lists.starts[number + 1];
            if (!splits_rows) {
                begin = std::lower_bound(begin, end, first);
                end = std::lower_bound(begin, end, last);
            }
            if (begin == end || !a.list_sizes[number]) continue;
            work.take(begin, 0, static_cast<int>(end - begin));
            work.list(number);
        }
    }
    return ready;
}

}  // namespace

extern "C" {

// Sizes of the structures, for callers to compare with theirs.
int elips_size(int which) {
    switch (which) {
        case 0: return static_cast<int>(sizeof(Arguments));
        case 1: return static_cast<int>(sizeof(Coding));
        case 2: return static_cast<int>(sizeof(Packed));
        default: return static_cast<int>(sizeof(Assigning));
    }
}

// Fills the codes of queries and their terms, as elips_search does where it is given none.
int elips_code(const Coding* coding) { return code_queries(*coding); }

// Fills the labels.
int elips_assign(const Assigning* assigning) {
    if (assigning->code_type == 0) return assigning::run<float>(*assigning);
#if defined(__AVX512VNNI__)
    if (assigning->code_type == 1) return assigning::run<int8_t>(*assigning);
#endif
    return UNKNOWN_TYPE;
}

// Fills scores, found and status, which says more where the outcome is OPEN.
int elips_search(const Arguments* arguments) {
    Arguments a = *arguments;
    if (a.packed.packing && a.code_type != 0) return UNKNOWN_TYPE;
    CodedHere coded;
    if (a.source) {
        const int outcome = coded.make(a);
        if (outcome != DONE) return outcome;
    }
    const int64_t n = int64_t(a.n_parts) * a.n_queries;
    Memory<Reservoir> reservoirs = allocate<Reservoir>(n);
    Memory<float> limits = allocate<float>(a.n_queries);
    if (!reservoirs || !limits) return NO_MEMORY;
    std::fill(reservoirs.get(), reservoirs.get() + n, Reservoir{});
    std::fill(limits.get(), limits.get() + a.n_queries, LOWEST);
    float* shared = a.n_parts > 1 ? limits.get() : nullptr;
    bool ready;
    if (a.code_type == 0) {
        ready = scan<float>(a, reservoirs.get(), shared);
    } else if (a.code_type == 1 && HAS_INT8) {
#if defined(__AVX512VNNI__)
        ready = scan<int8_t>(a, reservoirs.get(), shared);
#endif
    } else {
        return UNKNOWN_TYPE;
    }
    if (!ready) return NO_MEMORY;
    switch (a.vector_type) {
        case 0: ready = rank<float>(a, reservoirs.get()); break;
        case 1: ready = rank<Half>(a, reservoirs.get()); break;
        case 2: ready = rank<BFloat>(a, reservoirs.get()); break;
        default: return UNKNOWN_TYPE;
    }
    if (!ready) return NO_MEMORY;
    const bool done = std::all_of(a.status, a.status + a.n_queries, [](int32_t s) { return s == CERTIFIED; });
    return done ? DONE : OPEN;
}
}
