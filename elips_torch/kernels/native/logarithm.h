// Logarithms and powers of vectors of float32.
//
// Polynomials of least relative error, fitted on the interval that remains once exponents are split off.
// ln errs by less than 4 u max(1, |result|), exp2 by less than 4 u of its result, with u = 2**-24.
#pragma once

#include "lanes.h"

// x = fraction * 2**exponent, the fraction from sqrt(1/2) to sqrt(2), for positive numbers that are normal.
struct Split {
    Floats fraction, exponent;
};

constexpr int32_t ROOT_HALF_BITS = 0x3f3504f3;

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__)

static inline Split split(Floats x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i exponent = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(ROOT_HALF_BITS)), 23);
    const __m512i fraction = _mm512_sub_epi32(bits, _mm512_slli_epi32(exponent, 23));
    return {_mm512_castsi512_ps(fraction), _mm512_cvtepi32_ps(exponent)};
}
static inline Floats nearest_whole(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// 2**n of whole n from -126 to 127.
static inline Floats power_of_two(Floats n) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
static inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }

#else

static inline Split split(Floats x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i exponent = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(ROOT_HALF_BITS)), 23);
    const __m256i fraction = _mm256_sub_epi32(bits, _mm256_slli_epi32(exponent, 23));
    return {_mm256_castsi256_ps(fraction), _mm256_cvtepi32_ps(exponent)};
}
static inline Floats nearest_whole(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline Floats power_of_two(Floats n) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
static inline Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, b); }

#endif

// ln(fraction) of a split number.
static inline Floats ln_of_fraction(Floats fraction) {
    const Floats t = minus(fraction, all(1.0f)), square = times(t, t);
    Floats p = all(0.08917632699012756f);
    p = times_plus(p, t, all(-0.1435016691684723f));
    p = times_plus(p, t, all(0.14877018332481384f));
    p = times_plus(p, t, all(-0.16565638780593872f));
    p = times_plus(p, t, all(0.19965393841266632f));
    p = times_plus(p, t, all(-0.2500174641609192f));
    p = times_plus(p, t, all(0.33333858847618103f));
    return times_plus(square, times_plus(p, t, all(-0.5f)), t);
}

// Of positive numbers that are normal.
static inline Floats ln(Floats x) {
    const Split parts = split(x);
    return times_plus(parts.exponent, all(0.6931471805599453f), ln_of_fraction(parts.fraction));
}
static inline Floats log2(Floats x) {
    const Split parts = split(x);
    return times_plus(ln_of_fraction(parts.fraction), all(1.4426950408889634f), parts.exponent);
}

// Infinite where it is too large; NaN where x is.
static inline Floats exp2(Floats x) {
    // Where either is NaN, what is second.
    x = smaller(all(200.0f), larger(all(-200.0f), x));
    const Floats whole = nearest_whole(x), f = minus(x, whole);
    Floats p = all(0.00015467364573851228f);
    p = times_plus(p, f, all(0.0013400432653725147f));
    p = times_plus(p, f, all(0.009618035517632961f));
    p = times_plus(p, f, all(0.05550327152013779f));
    p = times_plus(p, f, all(0.24022650718688965f));
    p = times_plus(p, f, all(0.6931471824645996f));
    p = times_plus(p, f, all(1.0f));
    // In two steps, either of which is a normal number.
    const Floats half = nearest_whole(times(whole, all(0.5f)));
    return times(times(p, power_of_two(half)), power_of_two(minus(whole, half)));
}
