// Products of queries with rows of parts, by looking up what each part adds.
//
// For each query and part there is a table of what the 256 centroids add, in steps of a byte. The tables
// of a part fit four registers, in which 64 rows at a time look up theirs (after Andre, Kermarrec and Le
// Scouarnec, Cache locality is not enough, 2015, whose tables have 16 entries). For this the codes of 64
// rows are turned so that those of one part lie side by side.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>

#include "arguments.h"
#include "memory.h"
#include "reservoir.h"
#include "team.h"

constexpr int TURNED_ROWS = 64, ENTRIES = 256;

#if defined(__AVX512VNNI__)

static inline bool has_byte_permutes() { return __builtin_cpu_supports("avx512vbmi"); }

// Writes the codes of 64 rows of parts, which begin at these places, as (m, 64).
static void turn(const uint8_t* const (&rows)[TURNED_ROWS], int parts, uint8_t* out) {
    for (int first = 0; first < parts; first += 16) {
        const int n = std::min(16, parts - first);
        __m512i a[16], b[16];
        auto read = [&](auto row) __attribute__((always_inline)) {
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) {
                a[i] = _mm512_castsi128_si512(row(i));
                a[i] = _mm512_inserti32x4(a[i], row(i + 16), 1);
                a[i] = _mm512_inserti32x4(a[i], row(i + 32), 2);
                a[i] = _mm512_inserti32x4(a[i], row(i + 48), 3);
            }
        };
        if (n == 16) {
            // Without a mask, reading is part of the instruction that inserts.
            read([&](int r) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r] + first)); });
        } else {
            const __mmask16 there = static_cast<__mmask16>((1u << n) - 1);
            read([&](int r) { return _mm_maskz_loadu_epi8(there, rows[r] + first); });
        }
        // Each step rotates the number of a byte, register and place in it, by one bit: four swap the two.
        auto step = [](const __m512i(&from)[16], __m512i(&to)[16]) __attribute__((always_inline)) {
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) {
                to[2 * i] = _mm512_unpacklo_epi8(from[i], from[i + 8]);
                to[2 * i + 1] = _mm512_unpackhi_epi8(from[i], from[i + 8]);
            }
        };
        step(a, b);
        step(b, a);
        step(a, b);
        step(b, a);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
            if (i < n) _mm512_storeu_si512(out + int64_t(first + i) * TURNED_ROWS, a[i]);
    }
}

// Writes the sums (64,) of what the parts of turned rows add.
__attribute__((target("avx512vbmi"))) static void add_parts(const uint8_t* turned, const uint8_t* tables, int parts,
                                                            uint16_t* out) {
    const __m512i low = _mm512_set1_epi16(255);
    __m512i even = _mm512_setzero_si512(), odd = even;
    for (int part = 0; part < parts; ++part, turned += TURNED_ROWS, tables += ENTRIES) {
        const __m512i code = _mm512_loadu_si512(turned);
        // The upper two bits choose the register.
        const __mmask64 upper_half = _mm512_movepi8_mask(code);
        const __mmask64 upper_quarter = _mm512_movepi8_mask(_mm512_add_epi8(code, code));
        __m512i first = _mm512_permutexvar_epi8(code, _mm512_loadu_si512(tables));
        first = _mm512_mask_permutexvar_epi8(first, upper_quarter, code, _mm512_loadu_si512(tables + 64));
        __m512i second = _mm512_permutexvar_epi8(code, _mm512_loadu_si512(tables + 128));
        second = _mm512_mask_permutexvar_epi8(second, upper_quarter, code, _mm512_loadu_si512(tables + 192));
        const __m512i found = _mm512_mask_blend_epi8(upper_half, first, second);
        even = _mm512_add_epi16(even, _mm512_and_si512(found, low));
        odd = _mm512_add_epi16(odd, _mm512_srli_epi16(found, 8));
    }
    // Row 16 i + 2 j lies in lane i of the even ones.
    const __m512i begins = _mm512_unpacklo_epi16(even, odd), ends = _mm512_unpackhi_epi16(even, odd);
    const __m512i order = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), more = _mm512_add_epi64(order, _mm512_set1_epi64(4));
    _mm512_storeu_si512(out, _mm512_permutex2var_epi64(begins, order, ends));
    _mm512_storeu_si512(out + 32, _mm512_permutex2var_epi64(begins, more, ends));
}

// The tables of all queries. A row's product with a query is `base + step * sum`, give or take `error` and
// `norm` times its norm in steps of the grid.
class ByteTables {
   public:
    static bool serve(const Arguments& a) {
        // Sums fit 16 bits.
        return a.grid.features && a.packed.packing == BYTES && a.packed.ksub == ENTRIES && a.packed.parts <= 256 &&
               has_byte_permutes();
    }

    // Returns whether there was memory.
    bool make(const Arguments& a) {
        parts_ = a.packed.parts;
        tables_ = allocate<uint8_t>(int64_t(a.n_queries) * parts_ * ENTRIES);
        facts_ = allocate<Facts>(a.n_queries);
        if (!tables_ || !facts_) return false;
        std::atomic<bool> ready{true};
        Pieces pieces(a.n_queries, 1);
        const bool shares = int64_t(a.n_queries) * a.dim > WORTH_SHARING;
        Team::run(shares ? std::min(a.n_threads, a.n_queries) : 1, [&](int) {
            Memory<float> sums = allocate<float>(parts_ * (ENTRIES + 1));
            if (!sums) ready = false;
            for (int64_t q, last; sums && pieces.take(q, last);) make(a, q, sums.get());
        });
        return ready;
    }

    struct Facts {
        double base;
        float step, error, norm;
    };
    const Facts& facts(int64_t query) const { return facts_[query]; }
    const uint8_t* of(int64_t query) const { return tables_.get() + query * parts_ * ENTRIES; }

   private:
    void make(const Arguments& a, int64_t q, float* sums) {
        const int size = a.dim / parts_;
        const double* query = a.queries + q * a.dim;
        float* lowest = sums + int64_t(parts_) * ENTRIES;
        float range = 0.0f;
        double base = 0.0;
        for (int part = 0; part < parts_; ++part) {
            const float* features = a.grid.features + int64_t(part) * size * ENTRIES;
            __m512 sum[ENTRIES / 16];
#pragma GCC unroll 16
            for (auto& each : sum) each = _mm512_setzero_ps();
            for (int i = 0; i < size; ++i, features += ENTRIES) {
                const int feature = part * size + i;
                const __m512 value = _mm512_set1_ps(static_cast<float>(query[feature] - a.mean[feature]));
#pragma GCC unroll 16
                for (int j = 0; j < ENTRIES / 16; ++j)
                    sum[j] = _mm512_fmadd_ps(value, _mm512_loadu_ps(features + 16 * j), sum[j]);
            }
            __m512 low = sum[0], high = sum[0];
#pragma GCC unroll 16
            for (int j = 0; j < ENTRIES / 16; ++j) {
                _mm512_storeu_ps(sums + part * ENTRIES + 16 * j, sum[j]);
                low = _mm512_min_ps(low, sum[j]);
                high = _mm512_max_ps(high, sum[j]);
            }
            lowest[part] = _mm512_reduce_min_ps(low);
            range = std::max(range, _mm512_reduce_max_ps(high) - lowest[part]);
            base += lowest[part];
        }
        const float step = range > 0.0f ? range / 255.0f : 1.0f, per_step = 1.0f / step;
        uint8_t* table = tables_.get() + q * parts_ * ENTRIES;
        double error = 0.0;
        for (int part = 0; part < parts_; ++part) {
            const __m512 low = _mm512_set1_ps(lowest[part]);
            __m512 most = _mm512_setzero_ps();
            for (int j = 0; j < ENTRIES; j += 16) {
                const __m512 above = _mm512_sub_ps(_mm512_loadu_ps(sums + part * ENTRIES + j), low);
                const __m512i steps = _mm512_cvtps_epi32(_mm512_mul_ps(above, _mm512_set1_ps(per_step)));
                const __m512i entry = _mm512_min_epi32(_mm512_max_epi32(steps, _mm512_setzero_si512()), _mm512_set1_epi32(255));
                const __m512 off = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(entry), _mm512_set1_ps(step), above);
                most = _mm512_max_ps(most, _mm512_abs_ps(off));
                _mm_storeu_si128(reinterpret_cast<__m128i*>(table + part * ENTRIES + j), _mm512_cvtepi32_epi8(entry));
            }
            error += _mm512_reduce_max_ps(most) + 4.0 * UNIT * (range + std::fabs(lowest[part]));
        }
        // The query in steps of the grid is not longer than this.
        const double length = double(a.query_terms[a.n_queries + q]) + a.query_terms[2 * int64_t(a.n_queries) + q];
        Facts& facts = facts_[q];
        facts.base = base;
        facts.step = step;
        facts.error = static_cast<float>((error + length * a.grid.rounded) * (1.0 + 8.0 * UNIT)) + FLOOR;
        facts.norm = static_cast<float>(length * (size + 32) * UNIT * (1.0 + 8.0 * UNIT));
    }

    int parts_ = 0;
    Memory<uint8_t> tables_;
    Memory<Facts> facts_;
};

#else

static inline void turn(const uint8_t* const (&)[TURNED_ROWS], int, uint8_t*) {}
static inline void add_parts(const uint8_t*, const uint8_t*, int, uint16_t*) {}

class ByteTables {
   public:
    struct Facts {
        double base;
        float step, error, norm;
    };
    static bool serve(const Arguments&) { return false; }
    bool make(const Arguments&) { return false; }
    const Facts& facts(int64_t) const { return none_; }
    const uint8_t* of(int64_t) const { return nullptr; }

   private:
    Facts none_{};
};

#endif
