// Rows that are stored as codes, on a grid of whole steps: what exact int8 products need of them.
//
// A row is x = c + z + s * y, feature by feature: c is the centroid of its list, z and s are the same for
// all rows, and y is close to an int8 code u. So q . x = q . (c + z) + (q * s) . y, where the first term
// belongs to the query and the list, and the second is a product of codes once q * s is coded, too.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "lanes.h"
#include "memory.h"
#include "outcome.h"
#include "rescore.h"
#include "team.h"
#include "unpack.h"

extern "C" {

struct Grid {
    const float* steps;      // (D,) s, above zero; null where rows are not searched on a grid
    const double* zero;      // (D,) z, less the mean that queries are centred about
    const int8_t* table;     // (m, ksub, D / m), the codes of the centroids of parts; null for scalars
    const uint8_t* scalars;  // (2, D), which bits of a scalar count, and what is taken off these; null for parts
    const float* terms;      // (S, 2), at least |y| and close to the bias of the row in each slot
    const float* features;   // (m, D / m, 256), the centroids of parts, less z and the centroid; or null
    float residual;          // at least |y - u| of every row
    float rounded;           // the part of that which decoding loses by rounding
};

// What `elips_terms` takes.
struct GridTerms {
    Packed packed;
    Grid grid;
    const float* mean;      // (D,)
    const int64_t* rows;    // (M,)
    const int64_t* places;  // (M,), where in the terms those of each row go
    float* terms;           // (S, 2)
    int64_t n;              // M
    int32_t dim;
    int32_t metric;  // L2 or IP
    int32_t n_threads;
};
}

// Writes the codes (n, D) of n rows of parts; `place(r)` is where the stored ones of a row begin.
template <int SIZE, bool NIBBLE, class Place>
static void code_parts(const Grid& g, const Packed& p, int dim, int n, Place place, int8_t* out) {
    const int size = SIZE ? SIZE : dim / p.parts;
    const int64_t stride = int64_t(p.ksub) * size;
    for (int r = 0; r < n; ++r) {
        const uint8_t* codes = place(r);
        const int8_t* table = g.table;
        for (int part = 0; part < p.parts; ++part, out += size, table += stride) {
            const int number = NIBBLE ? codes[part / 2] >> (4 * (part % 2)) & 15 : codes[part];
            std::memcpy(out, table + int64_t(number) * size, size);
        }
    }
}

#if defined(__AVX512VNNI__)

// Eight parts of 8 features, or sixteen of 4, at a time.
template <class Place>
static void gather_eights(const Grid& g, int parts, int n, Place place, int8_t* out) {
    const __m512i first = _mm512_slli_epi64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), 8);
    for (int r = 0; r < n; ++r, out += 8 * parts) {
        const uint8_t* codes = place(r);
        for (int part = 0; part < parts; part += 8) {
            const __mmask8 there = parts - part < 8 ? (1u << (parts - part)) - 1 : 255;
            const __m128i bytes = _mm_maskz_loadu_epi8(there, codes + part);
            const __m512i places = _mm512_add_epi64(_mm512_cvtepu8_epi64(bytes), first);
            const void* from = g.table + int64_t(part) * 256 * 8;
            const __m512i found = _mm512_mask_i64gather_epi64(_mm512_setzero_si512(), there, places, from, 8);
            _mm512_mask_storeu_epi64(out + part * 8, there, found);
        }
    }
}

template <class Place>
static void gather_fours(const Grid& g, int parts, int n, Place place, int8_t* out) {
    const __m512i first = _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 8);
    for (int r = 0; r < n; ++r, out += 4 * parts) {
        const uint8_t* codes = place(r);
        for (int part = 0; part < parts; part += 16) {
            const __mmask16 there = parts - part < 16 ? (1u << (parts - part)) - 1 : 65535;
            const __m128i bytes = _mm_maskz_loadu_epi8(there, codes + part);
            const __m512i places = _mm512_add_epi32(_mm512_cvtepu8_epi32(bytes), first);
            const void* from = g.table + int64_t(part) * 256 * 4;
            const __m512i found = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, places, from, 4);
            _mm512_mask_storeu_epi32(out + part * 4, there, found);
        }
    }
}

// As `spread`, of 64 codes.
template <int BITS>
static inline __m512i spread_wide(__m512i codes) {
    if constexpr (BITS == 4) {
        const __m512i pairs = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(codes));
        return _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4)), _mm512_set1_epi8(15));
    } else {
        // Twelve bytes for each quarter, of which three hold four codes.
        const __m512i quarters = _mm512_setr_epi32(0, 1, 2, 0, 3, 4, 5, 0, 6, 7, 8, 0, 9, 10, 11, 0);
        const __m128i places = _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
        const __m512i fours =
            _mm512_shuffle_epi8(_mm512_permutexvar_epi32(quarters, codes), _mm512_broadcast_i32x4(places));
        const __m512i first = _mm512_and_si512(fours, _mm512_set1_epi32(63));
        const __m512i second = _mm512_and_si512(_mm512_slli_epi32(fours, 2), _mm512_set1_epi32(63 << 8));
        const __m512i third = _mm512_and_si512(_mm512_slli_epi32(fours, 4), _mm512_set1_epi32(63 << 16));
        const __m512i fourth = _mm512_and_si512(_mm512_slli_epi32(fours, 6), _mm512_set1_epi32(63 << 24));
        return _mm512_or_si512(_mm512_or_si512(first, second), _mm512_or_si512(third, fourth));
    }
}

// As `code_parts`, of rows of scalars.
template <int BITS, class Place>
static void code_scalars(const Grid& g, int dim, int n, Place place, int8_t* out) {
    for (int r = 0; r < n; ++r, out += dim) {
        const uint8_t* codes = place(r);
        for (int i = 0; i < dim; i += 64, codes += 8 * BITS) {
            const int left = std::min(64, dim - i);
            const __mmask64 there = ~0ull >> (64 - left), bytes = (1ull << bytes_of(left, BITS)) - 1;
            const __m512i spread = spread_wide<BITS>(_mm512_maskz_loadu_epi8(bytes, codes));
            const __m512i counted = _mm512_and_si512(spread, _mm512_maskz_loadu_epi8(there, g.scalars + i));
            const __m512i less = _mm512_maskz_loadu_epi8(there, g.scalars + dim + i);
            _mm512_mask_storeu_epi8(out + i, there, _mm512_sub_epi8(counted, less));
        }
    }
}

#endif

template <bool NIBBLE, class Place>
static void code_parts(const Grid& g, const Packed& p, int dim, int n, Place place, int8_t* out) {
#if defined(__AVX512VNNI__)
    if (!NIBBLE && p.ksub == 256 && dim == 8 * p.parts) return gather_eights(g, p.parts, n, place, out);
    if (!NIBBLE && p.ksub == 256 && dim == 4 * p.parts) return gather_fours(g, p.parts, n, place, out);
#endif
    switch (dim / p.parts) {
        case 2: return code_parts<2, NIBBLE>(g, p, dim, n, place, out);
        case 4: return code_parts<4, NIBBLE>(g, p, dim, n, place, out);
        case 8: return code_parts<8, NIBBLE>(g, p, dim, n, place, out);
        case 12: return code_parts<12, NIBBLE>(g, p, dim, n, place, out);
        case 16: return code_parts<16, NIBBLE>(g, p, dim, n, place, out);
        default: return code_parts<0, NIBBLE>(g, p, dim, n, place, out);
    }
}

template <class Place>
static void code_rows(const Grid& g, const Packed& p, int dim, int n, Place place, int8_t* out) {
#if defined(__AVX512VNNI__)
    if (p.packing == SCALAR6) return code_scalars<6>(g, dim, n, place, out);
    if (p.packing == SCALAR4) return code_scalars<4>(g, dim, n, place, out);
#endif
    if (p.packing == NIBBLES)
        code_parts<true>(g, p, dim, n, place, out);
    else
        code_parts<false>(g, p, dim, n, place, out);
}

// The point that the rows of a list are coded from, less the mean; and its products with queries.
class Origin {
   public:
    bool make(int dim) {
        point_ = allocate<double>(dim);
        return static_cast<bool>(point_);
    }

    // Take the point of a list; of all rows where there are no centroids.
    void take(const Packed& p, const Grid& g, int64_t list, int dim) {
        const float* centroid = centroid_of(p, list, dim);
        double square = 0.0;
        double* point = point_.get();
        for (int i = 0; i < dim; ++i) point[i] = centroid ? centroid[i] + g.zero[i] : g.zero[i];
#pragma omp simd reduction(+ : square)
        for (int i = 0; i < dim; ++i) square += point[i] * point[i];
        square_ = square;
        length_ = std::sqrt(square);
    }

    struct Offset {
        double value;   // to be added to what bounds say of the list
        double margin;  // at least what float64 may lose
    };

    Offset of(const double* query, const float* mean, int dim, int32_t metric) const {
        const double* point = point_.get();
        double product = 0.0, square = 0.0;
#pragma omp simd reduction(+ : product, square)
        for (int i = 0; i < dim; ++i) {
            const double q = query[i] - mean[i];
            product += q * point[i];
            square += q * q;
        }
        const double half = metric == L2 ? 0.5 * square_ : 0.0;
        constexpr double LOST = 1.0 / (1ull << 38);
        return {product - half, LOST * length_ * (std::sqrt(square) + length_)};
    }

    double at(int i) const { return point_[i]; }

   private:
    Memory<double> point_;
    double square_ = 0.0, length_ = 0.0;
};

static int make_terms(const GridTerms& t) {
    std::atomic<bool> ready{true};
    // Neighbouring slots belong to one list.
    Pieces pieces(t.n, t.n / (4 * t.n_threads));
    Team::run(t.n_threads, [&](int) {
        Memory<float> vector = allocate<float>(t.dim);
        Origin origin;
        if (!vector || !origin.make(t.dim)) {
            ready = false;
            return;
        }
        int64_t list = -1;
        for (int64_t i = 0, last = 0; i < last || pieces.take(i, last); ++i) {
            const int64_t row = t.rows[i];
            const int64_t own = t.packed.centroids ? t.packed.assignments[row] : 0;
            if (own != list) origin.take(t.packed, t.grid, list = own, t.dim);
            const float* x = vector.get();
            unpack(t.packed, row, t.dim, vector.get());
            double norm = 0.0, square = 0.0, product = 0.0, lost = 0.0;
#pragma omp simd reduction(+ : norm, square, product, lost)
            for (int j = 0; j < t.dim; ++j) {
                const double point = origin.at(j), away = double(x[j]) - t.mean[j] - point;
                const double y = away / t.grid.steps[j];
                const double size = (std::fabs(x[j]) + std::fabs(t.mean[j]) + std::fabs(point)) / t.grid.steps[j];
                norm += y * y;
                square += away * away;
                product += point * away;
                lost += size * size;
            }
            constexpr double ROUNDED = 1.0 / (1ull << 50), WIDER = 1.0 + 4.0 / 16777216.0;
            float* terms = t.terms + 2 * t.places[i];
            terms[0] = static_cast<float>((std::sqrt(norm) + ROUNDED * std::sqrt(lost)) * WIDER);
            terms[1] = t.metric == L2 ? static_cast<float>(-product - 0.5 * square) : 0.0f;
        }
    });
    return ready ? DONE : NO_MEMORY;
}
