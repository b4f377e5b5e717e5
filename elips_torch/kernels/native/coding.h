// Queries as codes of a plane, and the factors of their bounds: what `screen.code_queries` computes.
#pragma once

#include <cmath>
#include <cstdint>

#include "rescore.h"

extern "C" {

// All pointers are to contiguous memory that outlives the call.
struct Coding {
    const double* queries;  // (Q, D)
    const float* mean;      // (D,), or null where it is zero
    // Results: (Q, D) codes, float32 or int8; (3, Q) scale and factors of residual and norm; (Q,) each.
    void* codes;
    float* terms;
    double* rounding;
    double* offsets;
    uint8_t* usable;
    double rounded;  // roundoffs of float32 that a product may lose
    double largest;  // features of that size and more cannot be bounded
    int32_t dim;
    int32_t n_queries;
    int32_t metric;
    int32_t code_type;
    int32_t n_threads;
};
}

static inline float coded(double value, double, float*) { return static_cast<float>(value); }
static inline int8_t coded(double value, double scale, int8_t*) {
    return static_cast<int8_t>(std::min(127.0, std::max(-128.0, std::nearbyint(value / scale))));
}

template <class Code>
static void code_query(const Coding& c, int64_t q, double mean_length, double* wide) {
    constexpr bool IS_INT8 = sizeof(Code) == 1;
    constexpr double SMALLEST_SCALE = 1.0 / (1ull << 60);
    constexpr double LEAST_FACTOR = SMALLEST_SCALE * SMALLEST_SCALE;
    const double* query = c.queries + q * c.dim;
    double size = 1.0;
    if (c.metric == COSINE) {
        double square = 0.0;
        for (int i = 0; i < c.dim; ++i) square += query[i] * query[i];
        size = std::sqrt(square);
    }
    double square = 0.0, product = 0.0, largest = 0.0;
    bool usable = true;
    for (int i = 0; i < c.dim; ++i) {
        double value = query[i];
        const double mean = c.mean ? c.mean[i] : 0.0;
        if (c.metric == COSINE) value = size > 0.0 ? value / size : 0.0;
        if (c.metric == L2) value -= mean;
        product += value * mean;
        square += value * value;
        largest = std::max(largest, std::fabs(value));
        usable &= std::fabs(value) < c.largest;  // NaN is not
        wide[i] = value;
    }
    const float scale =
        IS_INT8 && usable ? static_cast<float>(std::max(largest / 127.0, SMALLEST_SCALE)) : 1.0f;
    Code* codes = static_cast<Code*>(c.codes) + q * c.dim;
    double length = 0.0, residual = 0.0;
    for (int i = 0; i < c.dim; ++i) {
        const double value = usable ? wide[i] : 0.0;
        codes[i] = coded(value, scale, static_cast<Code*>(nullptr));
        const double code = codes[i] * static_cast<double>(scale);
        length += code * code;
        residual += (value - code) * (value - code);
    }
    length = std::sqrt(length);
    residual = std::sqrt(residual);
    const double unit = 1.0 / 16777216.0, lost = c.rounded * unit;
    const double widen = (1.0 + 1.0 / (1ull << 40)) * (1.0 + 8.0 * unit);
    c.terms[q] = scale;
    c.terms[c.n_queries + q] = static_cast<float>((1.0 + lost) * length * widen + LEAST_FACTOR);
    c.terms[2 * int64_t(c.n_queries) + q] =
        static_cast<float>((residual + lost * length) * widen + LEAST_FACTOR);
    c.offsets[q] = c.metric == L2 ? square : product;
    c.rounding[q] = c.metric == L2 ? square : std::sqrt(square) * mean_length;
    c.usable[q] = usable;
}
