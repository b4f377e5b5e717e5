// Queries as codes of a plane, and the factors of their bounds: what `screen.code_queries` computes.
#pragma once

#include <cmath>
#include <cstdint>

#include "rescore.h"

extern "C" {

// All pointers are to contiguous memory that outlives the call.
struct Coding {
    const double* queries;  // (Q, D)
    const float* mean;      // (D,)
    const float* steps;     // (D,), queries are multiplied by them before they are coded; or null
    // Results: (Q, D) codes; (3, Q) scale and factors of residual and norm; (Q,) each.
    void* codes;
    float* terms;
    double* rounding;
    double* offsets;
    uint8_t* usable;
    double rounded;  // roundoffs of float32 that a product may lose, or the share of its terms that a sum may
    double largest;  // features of that size and more cannot be bounded
    double step;     // of codes whose differences are summed
    int32_t dim;
    int32_t n_queries;
    int32_t metric;
    int32_t code_type;  // 0 float32, 1 int8
    int32_t n_threads;
};
}

// The code that a value becomes, as a number.
static inline double coded(double value, double, float*) { return static_cast<float>(value); }
static inline double coded(double value, double scale, int8_t*) {
    const double code = std::rint(value / scale);
    return code > 127.0 ? 127.0 : code < -128.0 ? -128.0 : code;
}

template <class Code>
static void code_query(const Coding& c, int64_t q, double mean_length, double* wide) {
    constexpr bool IS_INT8 = sizeof(Code) == 1;
    constexpr double SMALLEST_SCALE = 1.0 / (1ull << 60);
    constexpr double LEAST_FACTOR = SMALLEST_SCALE * SMALLEST_SCALE;
    const double* query = c.queries + q * c.dim;
    const int dim = c.dim;
    double size = 1.0;
    if (c.metric == COSINE) {
        double square = 0.0;
#pragma omp simd reduction(+ : square)
        for (int i = 0; i < dim; ++i) square += query[i] * query[i];
        size = std::sqrt(square);
    }
    for (int i = 0; i < dim; ++i) {
        if (c.metric == COSINE)
            wide[i] = size > 0.0 ? query[i] / size : 0.0;
        else
            wide[i] = c.metric == L2 ? query[i] - c.mean[i] : query[i];
    }
    double square = 0.0, product = 0.0, largest = 0.0;
#pragma omp simd reduction(+ : square, product)
    for (int i = 0; i < dim; ++i) {
        product += wide[i] * c.mean[i];
        square += wide[i] * wide[i];
    }
    if (c.steps)
        for (int i = 0; i < dim; ++i) wide[i] *= c.steps[i];
    int unusable = 0;
#pragma omp simd reduction(+ : unusable) reduction(max : largest)
    for (int i = 0; i < dim; ++i) {
        const double value = std::fabs(wide[i]);
        largest = value > largest ? value : largest;
        unusable += value < c.largest ? 0 : 1;  // NaN is not below
    }
    const bool usable = unusable == 0;
    const float scale =
        IS_INT8 && usable ? static_cast<float>(std::max(largest / 127.0, SMALLEST_SCALE)) : 1.0f;
    Code* codes = static_cast<Code*>(c.codes) + q * dim;
    if (!usable) std::fill(wide, wide + dim, 0.0);
    double length = 0.0, residual = 0.0;
    const double step = scale;
#pragma omp simd reduction(+ : length, residual)
    for (int i = 0; i < dim; ++i) {
        const double number = coded(wide[i], step, static_cast<Code*>(nullptr)), code = number * step;
        length += code * code;
        residual += (wide[i] - code) * (wide[i] - code);
        codes[i] = static_cast<Code>(number);
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

// For sums of differences, see `difference_plane.py`: |q - x| is step * |code of q - code of x|, give or take what
// either code leaves. Where q lies beyond all codes, what its code leaves adds the same to every row, and errs by
// nothing.
template <class Code>
static void code_query_of_differences(const Coding& c, int64_t q) {
    constexpr double LEAST_FACTOR = 1.0 / (1ull << 60) / (1ull << 60), ROUNDED = 16.0 / 16777216.0;
    const double* query = c.queries + q * c.dim;
    Code* codes = static_cast<Code*>(c.codes) + q * c.dim;
    const double unit = c.metric == GOWER ? 1.0 / c.dim : 1.0;
    double size = 0.0, residual = 0.0, beyond = 0.0;
    int unusable = 0;
#pragma omp simd reduction(+ : size, residual, beyond, unusable)
    for (int i = 0; i < c.dim; ++i) {
        const double value = query[i] - c.mean[i];
        double number, code;
        if constexpr (sizeof(Code) == 1) {
            number = std::rint(value / c.step);
            code = number > 127.0 ? 127.0 : number < -128.0 ? -128.0 : number;
        } else {
            number = code = static_cast<Code>(value);
        }
        const double left = std::fabs(value - code * c.step);
        size += std::fabs(code) * c.step;
        residual += code == number ? left : 0.0;
        beyond += code == number ? 0.0 : left;
        const bool usable = std::fabs(value) < c.largest;  // NaN is not below
        unusable += usable ? 0 : 1;
        codes[i] = static_cast<Code>(usable ? code : 0.0);
    }
    c.terms[q] = static_cast<float>(-c.step * unit);
    c.terms[c.n_queries + q] = static_cast<float>(unit * (1.0 + ROUNDED));
    c.terms[2 * int64_t(c.n_queries) + q] =
        static_cast<float>(unit * (1.0 + ROUNDED) * (residual + (ROUNDED + c.rounded) * size) + LEAST_FACTOR);
    c.offsets[q] = c.rounding[q] = unit * beyond;
    c.usable[q] = unusable == 0;
}
