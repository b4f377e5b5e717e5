// Vectors of rows that are stored as codes: the numbers that the quantizers decode, bit for bit.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

extern "C" {

struct Packed {
    const uint8_t* codes;        // (N, code_size)
    const float* table;          // SCALAR: (D,) steps; else (m, ksub, D / m) centroids
    const float* low;            // SCALAR: (D,), what code 0 stands for
    const float* centroids;      // (L, D), added to the rows of each list; or null
    const int32_t* assignments;  // (N,), the list of each row
    int32_t packing;
    int32_t code_size;
    int32_t parts;
    int32_t ksub;
};
}

enum Packing : int32_t { NOT_PACKED = 0, SCALAR = 1, BYTES = 2, NIBBLES = 3 };

// Keeps a product and a sum two roundings: what the quantizer decodes is rounded twice.
static inline __m256 rounded(__m256 x) {
#if defined(__AVX512VL__)
    __asm__("" : "+v"(x));
#else
    __asm__("" : "+x"(x));
#endif
    return x;
}

static inline void unpack_scalars(const Packed& p, const uint8_t* codes, int dim, float* out) {
    int i = 0;
    for (; i + 8 <= dim; i += 8) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i));
        const __m256 steps = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
        const __m256 scaled = rounded(_mm256_mul_ps(steps, _mm256_loadu_ps(p.table + i)));
        _mm256_storeu_ps(out + i, _mm256_add_ps(scaled, _mm256_loadu_ps(p.low + i)));
    }
    for (; i < dim; ++i) {
        const __m256 scaled = rounded(_mm256_set1_ps(static_cast<float>(codes[i]) * p.table[i]));
        out[i] = _mm256_cvtss_f32(scaled) + p.low[i];
    }
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

// Writes the vector (D,) of a row.
static inline void unpack(const Packed& p, int64_t row, int dim, float* out) {
    const uint8_t* codes = p.codes + row * p.code_size;
    if (p.packing == SCALAR) {
        unpack_scalars(p, codes, dim, out);
    } else {
        switch (dim / p.parts) {
            case 2: unpack_parts<2>(p, codes, dim, out); break;
            case 4: unpack_parts<4>(p, codes, dim, out); break;
            case 8: unpack_parts<8>(p, codes, dim, out); break;
            case 12: unpack_parts<12>(p, codes, dim, out); break;
            case 16: unpack_parts<16>(p, codes, dim, out); break;
            default: unpack_parts<0>(p, codes, dim, out);
        }
    }
    if (!p.centroids) return;
    const float* centroid = p.centroids + int64_t(p.assignments[row]) * dim;
    for (int i = 0; i < dim; ++i) out[i] += centroid[i];
}
