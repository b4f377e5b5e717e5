// Products of codes, in registers.
//
// Many queries: each lane is a query, and codes are packed so that a step of the product reads one
// vector per LANES queries. One row after another is broadcast. A tile of ROWS rows by VECTORS vectors
// of queries stays in registers until its sums are complete.
//
// Few queries: each row is read once, LANES features at a time, and its sum is taken across the lanes.
//
// int8: the instruction multiplies unsigned by signed bytes. What is made unsigned, by adding 128,
// makes every sum larger by 128 times the sum of the other side, which is taken off again. Sums wrap
// around in between, and are right in the end as long as they fit 32 bits.
//
// Sums of absolute differences of codes take the place of products where these are asked for. Those of int8 codes
// are summed by one instruction, too, but eight features at a time: there each row meets one query after the other.
#pragma once

#include <cstring>

#include "lanes.h"
#include "rescore.h"

// Rows are read once, in order: ask for what comes soon. Asking beyond the end does no harm.
static inline void prefetch(const void* place, int bytes) {
    constexpr int AHEAD = 4096;
    for (int i = 0; i < bytes; i += 64) _mm_prefetch(static_cast<const char*>(place) + AHEAD + i, _MM_HINT_T0);
}

// Vectors of queries in a tile, at most, and rows that are read side by side for one query.
constexpr int MOST_VECTORS = 4, FEW = 4;

template <class Code>
struct Product;

template <>
struct Product<float> {
    using Query = float;
    using Packed = float;
    using Row = float;  // as many queries meet it
    using Sums = Floats;
    static constexpr bool TILES = true;         // many queries are multiplied together
    static constexpr int MOST_ONE_BY_ONE = 4;  // queries that are not (measured)
    static constexpr int PER_STEP = 1;          // features in a step

    static float pack(float code) { return code; }
    static int correction(const float*, int) { return 0; }
    static Sums start(int, const int*, int) { return all(0.0f); }
    static Sums step(Sums sums, const Packed* queries, const float* row) {
        return times_plus(load(queries), all(*row), sums);
    }
    static Floats floats(Sums sums) { return sums; }

    static int query_correction(const float*, int) { return 0; }
    // The products of FEW rows with one query.
    static void dots(const float* const (&rows)[FEW], const float* query, int dim, int, float* out) {
        Floats sums[FEW];
        for (auto& each : sums) each = all(0.0f);
        int i = 0;
        for (; i + LANES <= dim; i += LANES) {
            const Floats q = load(query + i);
            for (int r = 0; r < FEW; ++r) {
                prefetch(rows[r] + i, LANES * sizeof(float));
                sums[r] = times_plus(load(rows[r] + i), q, sums[r]);
            }
        }
        if (i < dim) {
            const Floats q = load_first(query + i, dim - i);
            for (int r = 0; r < FEW; ++r) sums[r] = times_plus(load_first(rows[r] + i, dim - i), q, sums[r]);
        }
        store_sums(sums, out);
    }
};

// bfloat16 codes, whose absolute differences are summed.
template <>
struct Product<BFloat> {
    using Query = float;
    using Packed = float;
    using Row = float;
    using Sums = Floats;
    static constexpr bool TILES = true;
    static constexpr int MOST_ONE_BY_ONE = LANES / 2;
    static constexpr int PER_STEP = 1;

    static float pack(float code) { return code; }
    static int correction(const BFloat*, int) { return 0; }
    static Sums start(int, const int*, int) { return all(0.0f); }
    static Sums step(Sums sums, const Packed* queries, const float* row) {
        return plus(sums, magnitude(minus(load(queries), all(*row))));
    }
    static Floats floats(Sums sums) { return sums; }

    static int query_correction(const float*, int) { return 0; }
    // The sums of FEW rows and one query.
    static void dots(const BFloat* const (&rows)[FEW], const float* query, int dim, int, float* out) {
        Floats sums[FEW];
        for (auto& each : sums) each = all(0.0f);
        int i = 0;
        for (; i + LANES <= dim; i += LANES) {
            const Floats q = load(query + i);
            for (int r = 0; r < FEW; ++r) {
                prefetch(rows[r] + i, LANES * sizeof(BFloat));
                sums[r] = plus(sums[r], magnitude(minus(q, load_bfloats(rows[r] + i))));
            }
        }
        if (const int left = dim - i) {
            const Floats q = load_first(query + i, left);
            for (int r = 0; r < FEW; ++r)
                sums[r] = plus(sums[r], magnitude(minus(q, load_first_bfloats(rows[r] + i, left))));
        }
        store_sums(sums, out);
    }
};

#if defined(__AVX512VNNI__)

template <>
struct Product<int8_t> {
    using Query = int8_t;
    using Packed = uint8_t;
    using Row = int8_t;
    using Sums = __m512i;
    static constexpr bool TILES = true;
    static constexpr int MOST_ONE_BY_ONE = 4;
    static constexpr int PER_STEP = 4;

    static uint8_t pack(int8_t code) { return static_cast<uint8_t>(code + 128); }
    static int correction(const int8_t* row, int dim) {
        const __m512i ones = _mm512_set1_epi8(1);
        __m512i sums = _mm512_setzero_si512();
        for (int i = 0; i < dim; i += 64) sums = _mm512_dpbusd_epi32(sums, ones, bytes(row + i, dim - i));
        return static_cast<int>(-128u * static_cast<uint32_t>(_mm512_reduce_add_epi32(sums)));
    }
    static Sums start(int correction, const int*, int) { return _mm512_set1_epi32(correction); }
    static Sums step(Sums sums, const Packed* queries, const int8_t* row) {
        int four;
        std::memcpy(&four, row, 4);
        return _mm512_dpbusd_epi32(sums, _mm512_loadu_si512(queries), _mm512_set1_epi32(four));
    }
    static Floats floats(Sums sums) { return _mm512_cvtepi32_ps(sums); }

    static int query_correction(const int8_t* query, int dim) { return correction(query, dim); }
    // The products of FEW rows with one query.
    static void dots(const int8_t* const (&rows)[FEW], const int8_t* query, int dim, int correction, float* out) {
        const __m512i high = _mm512_set1_epi8(static_cast<char>(0x80));
        __m512i sums[FEW];
        for (int r = 0; r < FEW; ++r) sums[r] = _mm512_setzero_si512();
        int i = 0;
        for (; i + 64 <= dim; i += 64) {
            const __m512i q = _mm512_loadu_si512(query + i);
            for (int r = 0; r < FEW; ++r) {
                prefetch(rows[r] + i, 64);
                sums[r] = _mm512_dpbusd_epi32(sums[r], _mm512_xor_si512(_mm512_loadu_si512(rows[r] + i), high), q);
            }
        }
        if (i < dim) {
            const __m512i q = bytes(query + i, dim - i);
            for (int r = 0; r < FEW; ++r)
                sums[r] = _mm512_dpbusd_epi32(sums[r], _mm512_xor_si512(bytes(rows[r] + i, dim - i), high), q);
        }
        store_sums(sums, correction, out);
    }
    // Four sums across the lanes together. They may wrap around on the way.
    static void store_sums(const __m512i (&sums)[FEW], int correction, float* out) {
        const __m512i low = _mm512_add_epi32(_mm512_unpacklo_epi32(sums[0], sums[1]),
                                             _mm512_unpackhi_epi32(sums[0], sums[1]));
        const __m512i top = _mm512_add_epi32(_mm512_unpacklo_epi32(sums[2], sums[3]),
                                             _mm512_unpackhi_epi32(sums[2], sums[3]));
        const __m512i both = _mm512_add_epi32(_mm512_unpacklo_epi64(low, top), _mm512_unpackhi_epi64(low, top));
        const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(both), _mm512_extracti64x4_epi64(both, 1));
        const __m128i quarter = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
        _mm_storeu_ps(out, _mm_cvtepi32_ps(_mm_add_epi32(quarter, _mm_set1_epi32(correction))));
    }

    static __m512i bytes(const void* p, int left) {
        if (left >= 64) return _mm512_loadu_si512(p);
        return _mm512_maskz_loadu_epi8((1ull << left) - 1, p);
    }
};

// Rows of unsigned codes, by signed ones of queries. What they are too large by is known of each query.
template <>
struct Product<uint8_t> {
    using Query = int8_t;
    using Packed = int8_t;
    using Row = uint8_t;
    using Sums = __m512i;
    static constexpr bool TILES = true;
    static constexpr int MOST_ONE_BY_ONE = 4;
    static constexpr int PER_STEP = 4;

    static int8_t pack(int8_t code) { return code; }
    static int correction(const uint8_t*, int) { return 0; }
    static Sums start(int, const int* corrections, int first) { return _mm512_loadu_si512(corrections + first); }
    static Sums step(Sums sums, const Packed* queries, const uint8_t* row) {
        int four;
        std::memcpy(&four, row, 4);
        return _mm512_dpbusd_epi32(sums, _mm512_set1_epi32(four), _mm512_loadu_si512(queries));
    }
    static Floats floats(Sums sums) { return _mm512_cvtepi32_ps(sums); }

    // The product of a query with a row.
    static int product(const int8_t* query, const uint8_t* row, int dim) {
        __m512i sums = _mm512_setzero_si512();
        for (int i = 0; i < dim; i += 64) {
            const __m512i q = Product<int8_t>::bytes(query + i, dim - i);
            sums = _mm512_dpbusd_epi32(sums, Product<int8_t>::bytes(row + i, dim - i), q);
        }
        return _mm512_reduce_add_epi32(sums);
    }
    // The products of FEW rows with one query.
    static void dots(const uint8_t* const (&rows)[FEW], const int8_t* query, int dim, int correction, float* out) {
        __m512i sums[FEW];
        for (int r = 0; r < FEW; ++r) sums[r] = _mm512_setzero_si512();
        int i = 0;
        for (; i + 64 <= dim; i += 64) {
            const __m512i q = _mm512_loadu_si512(query + i);
            for (int r = 0; r < FEW; ++r) {
                prefetch(rows[r] + i, 64);
                sums[r] = _mm512_dpbusd_epi32(sums[r], _mm512_loadu_si512(rows[r] + i), q);
            }
        }
        if (i < dim) {
            const __m512i q = Product<int8_t>::bytes(query + i, dim - i);
            for (int r = 0; r < FEW; ++r)
                sums[r] = _mm512_dpbusd_epi32(sums[r], Product<int8_t>::bytes(rows[r] + i, dim - i), q);
        }
        Product<int8_t>::store_sums(sums, correction, out);
    }
};

// A code whose absolute differences are summed.
struct StepCode {
    int8_t code;
};

template <>
struct Product<StepCode> {
    using Query = int8_t;
    using Packed = int8_t;
    using Row = StepCode;
    static constexpr bool TILES = false;
    static constexpr int MOST_ONE_BY_ONE = 0;
    static constexpr int PER_STEP = 1;

    static int query_correction(const int8_t*, int) { return 0; }
    // The sums of FEW rows and one query. Adding 128 to both sides makes them unsigned and changes no difference.
    static void dots(const StepCode* const (&rows)[FEW], const int8_t* query, int dim, int, float* out) {
        const __m512i high = _mm512_set1_epi8(static_cast<char>(0x80));
        __m512i sums[FEW];
        for (auto& each : sums) each = _mm512_setzero_si512();
        int i = 0;
        for (; i + 64 <= dim; i += 64) {
            const __m512i q = _mm512_xor_si512(_mm512_loadu_si512(query + i), high);
            for (int r = 0; r < FEW; ++r) {
                prefetch(rows[r] + i, 64);
                const __m512i x = _mm512_xor_si512(_mm512_loadu_si512(rows[r] + i), high);
                sums[r] = _mm512_add_epi64(sums[r], _mm512_sad_epu8(x, q));
            }
        }
        if (i < dim) {
            const __m512i q = _mm512_xor_si512(Product<int8_t>::bytes(query + i, dim - i), high);
            for (int r = 0; r < FEW; ++r) {
                const __m512i x = _mm512_xor_si512(Product<int8_t>::bytes(rows[r] + i, dim - i), high);
                sums[r] = _mm512_add_epi64(sums[r], _mm512_sad_epu8(x, q));
            }
        }
        Product<int8_t>::store_sums(sums, 0, out);
    }
};

#endif

static inline int steps_of(int dim, int per_step) { return (dim + per_step - 1) / per_step; }

// Packed codes of VECTORS * LANES queries: (step, vector, lane, feature of the step). A feature or a
// query that does not exist is 0 after packing: no product of it counts, and its lane is not looked at.
template <class Code, int VECTORS>
static void pack_queries(const typename Product<Code>::Query* const* queries, int n, int dim, typename Product<Code>::Packed* out) {
    constexpr int PER_STEP = Product<Code>::PER_STEP;
    const int steps = steps_of(dim, PER_STEP);
    std::memset(out, 0, sizeof(*out) * steps * VECTORS * LANES * PER_STEP);
    constexpr int STRIDE = VECTORS * LANES * PER_STEP;
    for (int q = 0; q < n; ++q) {
        const auto* query = queries[q];
        auto* place = out + q * PER_STEP;
        int i = 0;
        for (; i + PER_STEP <= dim; i += PER_STEP, place += STRIDE)
            for (int j = 0; j < PER_STEP; ++j) place[j] = Product<Code>::pack(query[i + j]);
        for (int j = 0; i < dim; ++i, ++j) place[j] = Product<Code>::pack(query[i]);
    }
}

// Sums of ROWS rows with VECTORS vectors of queries, each row or each query with its correction.
template <class Code, int ROWS, int VECTORS>
static inline void multiply(const typename Product<Code>::Row* const* rows, const int* corrections,
                            const int* query_corrections, const typename Product<Code>::Packed* queries, int dim,
                            typename Product<Code>::Sums (&sums)[ROWS][VECTORS]) {
    using P = Product<Code>;
    constexpr int PER_STEP = P::PER_STEP;
    typename P::Sums local[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; ++v) local[r][v] = P::start(corrections[r], query_corrections, v * LANES);
    const int features = steps_of(dim, PER_STEP) * PER_STEP;
    for (int i = 0; i < features; i += PER_STEP, queries += VECTORS * LANES * PER_STEP) {
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
            for (int v = 0; v < VECTORS; ++v)
                local[r][v] = P::step(local[r][v], queries + v * LANES * PER_STEP, rows[r] + i);
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = local[r][v];
}
