// Scores by the definition, in float64, and whether their rounding to float32 is beyond doubt.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

enum Metric : int32_t {
    L2 = 0,
    IP = 1,
    COSINE = 2,
    L1 = 3,
    LINF = 4,
    LP = 5,
    CANBERRA = 6,
    BRAYCURTIS = 7,
    JENSENSHANNON = 8,
    GOWER = 9
};

// Whether features are compared one by one; the others are products.
static inline bool is_distance(int32_t metric) { return metric >= L1; }

struct Half {
    uint16_t bits;
};
struct BFloat {
    uint16_t bits;
};

static inline double wide(double x) { return x; }
static inline double wide(float x) { return x; }
static inline double wide(Half x) { return _cvtsh_ss(x.bits); }
static inline double wide(BFloat x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Eight numbers, in as many registers as that takes.
typedef double Doubles __attribute__((vector_size(64)));
typedef float EightFloats __attribute__((vector_size(32)));

static inline Doubles wide8(const double* p) {
    Doubles values;
    std::memcpy(&values, p, sizeof(values));
    return values;
}
static inline Doubles widened(EightFloats values) {
#if defined(__AVX512F__)
    // Compilers take the vector apart otherwise.
    return reinterpret_cast<Doubles>(_mm512_cvtps_pd(reinterpret_cast<__m256>(values)));
#else
    return __builtin_convertvector(values, Doubles);
#endif
}
static inline Doubles wide8(const float* p) {
    EightFloats values;
    std::memcpy(&values, p, sizeof(values));
    return widened(values);
}
static inline EightFloats floats8(const Half* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return reinterpret_cast<EightFloats>(_mm256_cvtph_ps(bits));
}
static inline EightFloats floats8(const BFloat* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return reinterpret_cast<EightFloats>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
// As float32.
static inline void convert(const float* from, int n, float* to) { std::copy(from, from + n, to); }
template <class Value>
static void convert(const Value* from, int n, float* to) {
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        const EightFloats values = floats8(from + i);
        std::memcpy(to + i, &values, sizeof(values));
    }
    for (; i < n; ++i) to[i] = static_cast<float>(wide(from[i]));
}
static inline Doubles wide8(const Half* p) { return widened(floats8(p)); }
static inline Doubles wide8(const BFloat* p) { return widened(floats8(p)); }
static inline double sum(Doubles a) {
    return ((a[0] + a[1]) + (a[2] + a[3])) + ((a[4] + a[5]) + (a[6] + a[7]));
}

static inline double square_of(const float* vector, int dim) {
    Doubles sums[4] = {};
    int i = 0;
    for (; i + 32 <= dim; i += 32)
        for (int part = 0; part < 4; ++part) {
            const Doubles x = wide8(vector + i + 8 * part);
            sums[part] += x * x;
        }
    for (; i + 8 <= dim; i += 8) sums[0] += wide8(vector + i) * wide8(vector + i);
    double total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < dim; ++i) total += double(vector[i]) * vector[i];
    return total;
}

struct Sums {
    double product;
    double row_square;
    double difference_square;
};

// Sums over the features of a query and a row.
template <class Value, bool DIFFERENCE>
static Sums sums_of(const double* query, const Value* row, int dim) {
    Doubles product[2] = {}, row_square[2] = {}, difference_square[2] = {};
    auto add = [&](int i, int part) {
        const Doubles q = wide8(query + i), x = wide8(row + i);
        if (DIFFERENCE) {
            difference_square[part] += (q - x) * (q - x);
        } else {
            product[part] += q * x;
            row_square[part] += x * x;
        }
    };
    int i = 0;
    for (; i + 16 <= dim; i += 16) {
        add(i, 0);
        add(i + 8, 1);
    }
    if (i + 8 <= dim) {
        add(i, 0);
        i += 8;
    }
    Sums sums = {sum(product[0] + product[1]), sum(row_square[0] + row_square[1]),
                 sum(difference_square[0] + difference_square[1])};
    for (; i < dim; ++i) {
        const double q = query[i], x = wide(row[i]);
        sums.product += q * x;
        sums.row_square += x * x;
        sums.difference_square += (q - x) * (q - x);
    }
    return sums;
}

struct Score {
    float value;
    bool sure;
};

// Whether features are whole multiples of 1 / scale.
template <class Value>
static bool are_whole(const double* query, const Value* row, int dim, double scale) {
    bool all_are = true;
    for (int i = 0; i < dim; ++i) {
        const double q = query[i] * scale, x = wide(row[i]) * scale;
        all_are &= q == std::nearbyint(q);
        all_are &= x == std::nearbyint(x);
    }
    return all_are;
}

// Whether every sum of products of features, or of squares of differences, is exact, in whatever order, where none
// exceeds `size`: as of short floats, whose sums often lie between two float32 numbers.
template <class Value>
static bool products_are_exact(const double* query, const Value* row, int dim, double size) {
    if (!(size < std::numeric_limits<double>::infinity())) return false;
    int exponent;
    std::frexp(size, &exponent);
    return are_whole(query, row, dim, std::ldexp(1.0, (52 - exponent) >> 1));
}

// Both this sum and the definition's err by at most (dim + 2) u of their size, a quotient by twice as
// much. Where everything within that error rounds alike, the definition rounds to it, too (Ziv, Fast
// evaluation of elementary mathematical functions with correctly rounded last bit, 1991).
template <class Value>
static Score score(int32_t metric, const double* query, double query_length, const Value* row, int dim) {
    double value, size;
    if (metric == L2) {
        value = size = sums_of<Value, true>(query, row, dim).difference_square;
    } else {
        const Sums sums = sums_of<Value, false>(query, row, dim);
        const double lengths = query_length * std::sqrt(sums.row_square);
        if (metric == IP) {
            value = sums.product;
            size = lengths;
        } else {
            value = lengths == 0.0 ? 0.0 : sums.product / lengths;
            size = 1.0;
        }
    }
    const double error = size * (4.0 * (dim + 8) / 9007199254740992.0);
    const float low = static_cast<float>(value - error), high = static_cast<float>(value + error);
    if (low != high && metric != COSINE && products_are_exact(query, row, dim, size))
        return {static_cast<float>(value) + 0.0f, true};
    // Rounded from below, a zero may carry a sign; scores have none.
    return {low + 0.0f, low == high};
}
