// Scores by the definition, in float64, and whether their rounding to float32 is beyond doubt.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>

enum Metric : int32_t { L2 = 0, IP = 1, COSINE = 2 };

struct Half {
    uint16_t bits;
};
struct BFloat {
    uint16_t bits;
};

static inline double wide(float x) { return x; }
static inline double wide(Half x) { return _cvtsh_ss(x.bits); }
static inline double wide(BFloat x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

struct Sums {
    double product = 0.0;
    double row_square = 0.0;
    double difference_square = 0.0;
};

// Sums over the features of a query and a row, in eight parts.
template <class Value, bool DIFFERENCE>
static Sums sums_of(const double* query, const Value* row, int dim) {
    double product[8] = {}, row_square[8] = {}, difference_square[8] = {};
    int i = 0;
    for (; i + 8 <= dim; i += 8) {
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
            const double q = query[i + j], x = wide(row[i + j]);
            if (DIFFERENCE) {
                difference_square[j] += (q - x) * (q - x);
            } else {
                product[j] += q * x;
                row_square[j] += x * x;
            }
        }
    }
    Sums sums;
    for (; i < dim; ++i) {
        const double q = query[i], x = wide(row[i]);
        sums.product += q * x;
        sums.row_square += x * x;
        sums.difference_square += (q - x) * (q - x);
    }
    for (int j = 0; j < 8; ++j) {
        sums.product += product[j];
        sums.row_square += row_square[j];
        sums.difference_square += difference_square[j];
    }
    return sums;
}

struct Score {
    float value;
    bool sure;
};

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
    // Rounded from below, a zero may carry a sign; scores have none.
    return {low + 0.0f, low == high};
}
