// Vectors of rows that are stored as codes: the numbers that the quantizers decode, bit for bit.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "lanes.h"

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
template <class Register>
static inline Register rounded(Register x) {
#if defined(__AVX512VL__)
    __asm__("" : "+v"(x));
#else
    __asm__("" : "+x"(x));
#endif
    return x;
}

// The centroid is null where nothing is added.
static inline void unpack_scalars(const Packed& p, const uint8_t* codes, int dim, const float* centroid, float* out) {
    int i = 0;
    for (; i + LANES <= dim; i += LANES) {
        auto value = rounded(times(load_bytes(codes + i), load(p.table + i)));
        value = plus(value, load(p.low + i));
        if (centroid) value = plus(value, load(centroid + i));
        store(out + i, value);
    }
    for (; i < dim; ++i) {
        const __m256 scaled = rounded(_mm256_set1_ps(static_cast<float>(codes[i]) * p.table[i]));
        out[i] = _mm256_cvtss_f32(scaled) + p.low[i];
        if (centroid) out[i] += centroid[i];
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
    const float* centroid = p.centroids ? p.centroids + int64_t(p.assignments[row]) * dim : nullptr;
    if (p.packing == SCALAR) {
        unpack_scalars(p, codes, dim, centroid, out);
        return;
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
