// Vectors of float32 as wide as the target has them, and the few operations that the search needs.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

// The first n of 16 bytes; the others are 0.
static inline __m128i load_some(const uint8_t* p, int n) {
#if defined(__AVX512VL__) && defined(__AVX512BW__)
    return _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << n) - 1), p);
#else
    alignas(16) uint8_t some[16] = {};
    std::memcpy(some, p, n);
    return _mm_load_si128(reinterpret_cast<const __m128i*>(some));
#endif
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__)

constexpr int LANES = 16;
using Floats = __m512;

static inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
static inline Floats load_first(const float* p, int n) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
}
static inline Floats load_shorts(const uint16_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
// Short floats.
static inline Floats load_halves(const void* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
static inline Floats load_bfloats(const void* p) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
static inline Floats load_first_bfloats(const void* p, int n) {
    const __m256i bits = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
// The first LANES of 16 bytes as numbers.
static inline Floats first_numbers(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)); }
static inline void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }
static inline void store_first(float* p, Floats a, int n) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), a);
}
static inline Floats all(float x) { return _mm512_set1_ps(x); }
static inline Floats plus(Floats a, Floats b) { return _mm512_add_ps(a, b); }
static inline Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
static inline Floats times_plus(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
static inline Floats minus(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
static inline Floats divided(Floats a, Floats b) { return _mm512_div_ps(a, b); }
static inline Floats magnitude(Floats a) { return _mm512_abs_ps(a); }
// 0 where `test` is 0, else a.
static inline Floats unless_zero(Floats test, Floats a) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(test, _mm512_setzero_ps(), _CMP_NEQ_UQ), a);
}
// Where a is NaN, b.
static inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
// One bit per lane where a is not below b; NaN is not below anything.
static inline unsigned not_below(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
static inline float sum(Floats a) { return _mm512_reduce_add_ps(a); }
// Four sums together, in less than four take.
static inline void store_sums(const Floats (&a)[4], float* out) {
    const __m512 low = _mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
    const __m512 top = _mm512_add_ps(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
    const __m512 both = _mm512_add_ps(_mm512_shuffle_ps(low, top, 0x44), _mm512_shuffle_ps(low, top, 0xEE));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(both), _mm512_extractf32x8_ps(both, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
static inline float largest(Floats a) { return _mm512_reduce_max_ps(a); }
// One bit per lane whose bits, as an unsigned number, are neither 0 nor from `least` to `most`.
static inline unsigned not_zero_or_between(Floats a, uint32_t least, uint32_t most) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i above = _mm512_sub_epi32(bits, _mm512_set1_epi32(static_cast<int>(least)));
    return _mm512_mask_test_epi32_mask(_mm512_cmpgt_epu32_mask(above, _mm512_set1_epi32(static_cast<int>(most - least))), bits, bits);
}
// Write the lanes of the bits one behind the other; what follows them is undefined.
static inline void store_chosen(void* p, unsigned bits, const void* lanes) {
    _mm512_storeu_ps(p, _mm512_maskz_compress_ps(static_cast<__mmask16>(bits), _mm512_loadu_ps(lanes)));
}

#else

constexpr int LANES = 8;
using Floats = __m256;

static inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
static inline __m256i first_lanes(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline Floats load_first(const float* p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
static inline Floats load_shorts(const uint16_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
static inline Floats load_halves(const void* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
static inline Floats load_bfloats(const void* p) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}
static inline Floats load_first_bfloats(const void* p, int n) {
    alignas(16) uint8_t some[16] = {};
    std::memcpy(some, p, 2 * n);
    return load_bfloats(some);
}
static inline Floats first_numbers(__m128i bytes) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)); }
static inline void store(float* p, Floats a) { _mm256_storeu_ps(p, a); }
static inline void store_first(float* p, Floats a, int n) { _mm256_maskstore_ps(p, first_lanes(n), a); }
static inline Floats all(float x) { return _mm256_set1_ps(x); }
static inline Floats plus(Floats a, Floats b) { return _mm256_add_ps(a, b); }
static inline Floats times(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
static inline Floats times_plus(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
static inline Floats minus(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
static inline Floats divided(Floats a, Floats b) { return _mm256_div_ps(a, b); }
static inline Floats magnitude(Floats a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static inline Floats unless_zero(Floats test, Floats a) {
    return _mm256_and_ps(_mm256_cmp_ps(test, _mm256_setzero_ps(), _CMP_NEQ_UQ), a);
}
static inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
static inline unsigned not_below(Floats a, Floats b) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ)));
}
static inline float sum(Floats a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
static inline void store_sums(const Floats (&a)[4], float* out) {
    const __m256 both = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
}
static inline unsigned not_zero_or_between(Floats a, uint32_t least, uint32_t most) {
    const __m256i bits = _mm256_castps_si256(a), range = _mm256_set1_epi32(static_cast<int>(most - least));
    const __m256i above = _mm256_sub_epi32(bits, _mm256_set1_epi32(static_cast<int>(least)));
    const __m256i within = _mm256_cmpeq_epi32(_mm256_min_epu32(above, range), above);
    const __m256i fine = _mm256_or_si256(within, _mm256_cmpeq_epi32(bits, _mm256_setzero_si256()));
    return ~static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(fine))) & 0xFF;
}
static inline float largest(Floats a) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
static inline void store_chosen(void* p, unsigned bits, const void* lanes) {
    int32_t from[LANES];
    std::memcpy(from, lanes, sizeof(from));
    int32_t* to = static_cast<int32_t*>(p);
    for (; bits; bits &= bits - 1) *to++ = from[__builtin_ctz(bits)];
}

#endif

#if defined(__AVX512VNNI__)
constexpr bool HAS_INT8 = true;
#else
constexpr bool HAS_INT8 = false;
#endif
