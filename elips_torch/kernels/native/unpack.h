// Vectors of rows that are stored as codes: the numbers that the quantizers decode, bit for bit.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "lanes.h"

extern "C" {

struct Packed {
    const uint8_t* codes;        // (N, code_size)
    const int32_t* places;       // (N,), where in the codes those of each row lie; null where that is its number
    const int32_t* slot_places;  // (S,), the same of the row in each slot; or null
    const float* table;          // scalars: (D,) steps; parts: (m, ksub, D / m) centroids; short floats: null
    const float* low;            // scalars: (D,), what code 0 stands for
    const float* centroids;      // (L, D), added to the rows of each list; or null
    const int32_t* assignments;  // (N,), the list of each row
    int32_t packing;
    int32_t code_size;
    int32_t parts;
    int32_t ksub;
};
}

// Scalars of 8, 6 or 4 bits a feature; parts of 8 or 4 bits; and features that are short floats.
enum Packing : int32_t {
    NOT_PACKED = 0,
    SCALAR8 = 1,
    BYTES = 2,
    NIBBLES = 3,
    SCALAR6 = 4,
    SCALAR4 = 5,
    HALVES = 6,
    BFLOATS = 7,
};

// Keeps a product and a sum two roundings: what the quantizer decodes is rounded twice.
template <class Register>
static inline Register rounded(Register x) {
#if defined(__AVX512VL__)
    __asm__("" : "+v"(x));
#else
    __asm__("" : "+x"(x));
#endif
    return x;
}

// Codes of scalars that are taken at a time.
constexpr int SPREAD = 16;

constexpr int bytes_of(int n_codes, int bits) { return (n_codes * bits + 7) / 8; }

// Codes of so many bits, the lowest first, as a byte each.
template <int BITS>
static inline __m128i spread(__m128i codes) {
    static_assert(BITS == 8 || BITS == 6 || BITS == 4);
    if constexpr (BITS == 8) {
        return codes;
    } else if constexpr (BITS == 4) {
        const __m128i pairs = _mm_cvtepu8_epi16(codes);
        return _mm_and_si128(_mm_or_si128(pairs, _mm_slli_epi16(pairs, 4)), _mm_set1_epi8(15));
    } else {
        // Four codes in three bytes.
        const __m128i places = _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
        const __m128i fours = _mm_shuffle_epi8(codes, places);
        const __m128i first = _mm_and_si128(fours, _mm_set1_epi32(63));
        const __m128i second = _mm_and_si128(_mm_slli_epi32(fours, 2), _mm_set1_epi32(63 << 8));
        const __m128i third = _mm_and_si128(_mm_slli_epi32(fours, 4), _mm_set1_epi32(63 << 16));
        const __m128i fourth = _mm_and_si128(_mm_slli_epi32(fours, 6), _mm_set1_epi32(63 << 24));
        return _mm_or_si128(_mm_or_si128(first, second), _mm_or_si128(third, fourth));
    }
}

// The codes of features from i on, a multiple of SPREAD, of which there are n. Reads no byte behind them.
template <int BITS>
static inline __m128i spread(const uint8_t* codes, int i, int n) {
    codes += i / 8 * BITS;
    if (n < SPREAD) return spread<BITS>(load_some(codes, bytes_of(n, BITS)));
    if constexpr (BITS == 8) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
    if constexpr (BITS == 6) {
        int32_t others;
        std::memcpy(&others, codes + 8, sizeof(others));
        bytes = _mm_insert_epi32(bytes, others, 2);
    }
    return spread<BITS>(bytes);
}

// What the codes of LANES features, or of the first n of these, stand for; the centroid is null where nothing
// is added.
template <bool ALL>
static inline void put_scalars(const Packed& p, Floats codes, int i, int n, const float* centroid, float* out) {
    auto of = [&](const float* x) { return ALL ? load(x + i) : load_first(x + i, n); };
    Floats value = plus(rounded(times(codes, of(p.table))), of(p.low));
    if (centroid) value = plus(value, of(centroid));
    if (ALL)
        store(out + i, value);
    else
        store_first(out + i, value, n);
}

template <int BITS>
static inline void unpack_scalars(const Packed& p, const uint8_t* codes, int dim, const float* centroid, float* out) {
    int i = 0;
    while (i + SPREAD <= dim) {
        __m128i bytes = spread<BITS>(codes, i, SPREAD);
        for (int end = i + SPREAD; i < end; i += LANES, bytes = _mm_srli_si128(bytes, 8))
            put_scalars<true>(p, first_numbers(bytes), i, LANES, centroid, out);
    }
    if (i == dim) return;
    __m128i bytes = spread<BITS>(codes, i, dim - i);
    for (; i < dim; i += LANES, bytes = _mm_srli_si128(bytes, 8))
        put_scalars<false>(p, first_numbers(bytes), i, std::min(LANES, dim - i), centroid, out);
}

template <int32_t PACKING>
static inline void unpack_floats(const uint8_t* codes, int dim, const float* centroid, float* out) {
    auto widened = [](const uint8_t* from) { return PACKING == HALVES ? load_halves(from) : load_bfloats(from); };
    int i = 0;
    for (; i + LANES <= dim; i += LANES) {
        const Floats value = widened(codes + 2 * i);
        store(out + i, centroid ? plus(value, load(centroid + i)) : value);
    }
    if (i == dim) return;
    uint8_t some[2 * LANES] = {};
    std::memcpy(some, codes + 2 * i, 2 * (dim - i));
    const Floats value = widened(some);
    store_first(out + i, centroid ? plus(value, load_first(centroid + i, dim - i)) : value, dim - i);
}

// Writes four vectors of short floats with the same centroid, or null, and their squares.
template <int32_t PACKING>
static inline void unpack_four(const uint8_t* const (&codes)[4], int dim, const float* centroid,
                               float* const (&out)[4], float* squares) {
    auto widened = [](const uint8_t* from) { return PACKING == HALVES ? load_halves(from) : load_bfloats(from); };
    Floats sums[4];
    for (auto& each : sums) each = all(0.0f);
    int i = 0;
    for (; i + LANES <= dim; i += LANES) {
        const Floats more = centroid ? load(centroid + i) : all(0.0f);
        for (int r = 0; r < 4; ++r) {
            Floats value = widened(codes[r] + 2 * i);
            // Adding 0 would take the sign off a zero.
            if (centroid) value = plus(value, more);
            store(out[r] + i, value);
            sums[r] = times_plus(value, value, sums[r]);
        }
    }
    for (int r = 0; i < dim && r < 4; ++r) {
        uint8_t some[2 * LANES] = {};
        std::memcpy(some, codes[r] + 2 * i, 2 * (dim - i));
        Floats value = widened(some);
        if (centroid) value = plus(value, load_first(centroid + i, dim - i));
        store_first(out[r] + i, value, dim - i);
        sums[r] = times_plus(value, value, sums[r]);
    }
    store_sums(sums, squares);
}

template <int SIZE>
static inline void unpack_parts(const Packed& p, const uint8_t* codes, int dim, float* out) {
    const int size = SIZE ? SIZE : dim / p.parts;
    const float* table = p.table;
    for (int part = 0; part < p.parts; ++part, out += size, table += int64_t(p.ksub) * size) {
        const int byte = p.packing == NIBBLES ? codes[part / 2] >> (4 * (part % 2)) & 15 : codes[part];
        std::memcpy(out, table + int64_t(byte) * size, size * sizeof(float));
    }
}

// Where codes begin that lie in a place; and those of a row.
static inline const uint8_t* codes_at(const Packed& p, int64_t place) { return p.codes + place * p.code_size; }
static inline const uint8_t* codes_of(const Packed& p, int64_t row) {
    return codes_at(p, p.places ? p.places[row] : row);
}

// What is added to a row of a list, or null.
static inline const float* centroid_of(const Packed& p, int64_t list, int dim) {
    return p.centroids ? p.centroids + list * dim : nullptr;
}

// Writes the vector (D,) of codes, given the centroid that is added.
static inline void unpack(const Packed& p, const uint8_t* codes, int dim, const float* centroid, float* out) {
    switch (p.packing) {
        case SCALAR8: return unpack_scalars<8>(p, codes, dim, centroid, out);
        case SCALAR6: return unpack_scalars<6>(p, codes, dim, centroid, out);
        case SCALAR4: return unpack_scalars<4>(p, codes, dim, centroid, out);
        case HALVES: return unpack_floats<HALVES>(codes, dim, centroid, out);
        case BFLOATS: return unpack_floats<BFLOATS>(codes, dim, centroid, out);
    }
    switch (dim / p.parts) {
        case 2: unpack_parts<2>(p, codes, dim, out); break;
        case 4: unpack_parts<4>(p, codes, dim, out); break;
        case 8: unpack_parts<8>(p, codes, dim, out); break;
        case 12: unpack_parts<12>(p, codes, dim, out); break;
        case 16: unpack_parts<16>(p, codes, dim, out); break;
        default: unpack_parts<0>(p, codes, dim, out);
    }
    for (int i = 0; centroid && i < dim; ++i) out[i] += centroid[i];
}

// Writes the vector (D,) of a row, in whatever list it is.
static inline void unpack(const Packed& p, int64_t row, int dim, float* out) {
    unpack(p, codes_of(p, row), dim, centroid_of(p, p.centroids ? p.assignments[row] : 0, dim), out);
}
