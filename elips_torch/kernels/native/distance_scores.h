// Distances by the definition, in float64, and whether their rounding to float32 is beyond doubt.
#pragma once

#include <cmath>

#include "distances.h"
#include "rescore.h"

static inline Doubles magnitude(Doubles x) { return x < 0.0 ? -x : x; }
static inline double magnitude(double x) { return std::fabs(x); }
static inline Doubles quotient(Doubles a, Doubles b) { return b == 0.0 ? Doubles{} : a / b; }
static inline double quotient(double a, double b) { return b == 0.0 ? 0.0 : a / b; }

// The sum of what `term` makes of each feature; of eight at a time, or of one.
template <class Value, class Term>
static double sum_of(const double* query, const Value* row, int dim, Term term) {
    Doubles sums[2] = {};
    int i = 0;
    for (; i + 16 <= dim; i += 16)
        for (int part = 0; part < 2; ++part) sums[part] += term(wide8(query + i + 8 * part), wide8(row + i + 8 * part));
    double total = 0.0;
    for (; i < dim; ++i) total += term(query[i], wide(row[i]));
    return total + sum(sums[0] + sums[1]);
}

template <class Value>
static double largest_difference(const double* query, const Value* row, int dim) {
    double found = 0.0, all = 0.0;
    for (int i = 0; i < dim; ++i) {
        const double size = std::fabs(query[i] - wide(row[i]));
        found = size > found ? size : found;
        all += size;
    }
    // NaN is not larger than anything.
    return all != all ? all : found;
}

// Whether every sum of differences that makes `total` is exact, in whatever order: all features are whole
// multiples of a number of which a float64 holds that many.
template <class Value>
static bool sums_are_exact(const double* query, const Value* row, int dim, double total) {
    if (!(total < HIGHEST)) return false;
    int exponent;
    std::frexp(total, &exponent);
    return are_whole(query, row, dim, std::ldexp(1.0, 52 - exponent));
}

template <class Value>
static double sum_of_powers(double power, const double* query, const Value* row, int dim) {
    const int whole = whole_power(power);
    if (whole)
        return sum_of(query, row, dim, [&](auto q, auto x) {
            const auto size = magnitude(q - x);
            auto product = size;
            for (int i = 1; i < whole; ++i) product *= size;
            return product;
        });
    double total = 0.0;
    for (int i = 0; i < dim; ++i) total += std::pow(std::fabs(query[i] - wide(row[i])), power);
    return total;
}

// A share of all features, or 0 where q is.
static inline double divergence(double q, double middle) { return q == 0.0 ? 0.0 : q * std::log(q / middle); }

// What is rounded is the distance, which errs by so much at most, as does the definition's.
static inline Score rounded(double distance, double error) {
    const float low = static_cast<float>(distance - error), high = static_cast<float>(distance + error);
    // Rounded from below, a zero may carry a sign; scores have none.
    return {low + 0.0f, low == high};
}

// Sums of n terms in any order err by at most (n + 2) u of their size, differences, quotients and powers by some
// units more; all of that twice over (Ziv, as above). What underflows is less than the last term.
template <class Value>
static Score distance_score(int32_t metric, double power, const double* query, const Value* row, int dim) {
    constexpr double UNIT_64 = 1.0 / 9007199254740992.0, LEAST = 1e-290;
    const double roundings = 4.0 * (dim + 8) * UNIT_64;
    auto difference = [](auto q, auto x) { return magnitude(q - x); };
    switch (metric) {
        case LINF: return rounded(largest_difference(query, row, dim), 0.0);
        case LP: {
            const double distance = sum_of_powers(power, query, row, dim);
            return rounded(distance, distance * (roundings + 8.0 * power * UNIT_64) + dim * LEAST);
        }
        case CANBERRA: {
            const double distance = sum_of(query, row, dim, [](auto q, auto x) {
                return quotient(magnitude(q - x), magnitude(q) + magnitude(x));
            });
            return rounded(distance, distance * roundings);
        }
        case BRAYCURTIS: {
            const double differences = sum_of(query, row, dim, difference);
            const double total = sum_of(query, row, dim, [](auto q, auto x) { return magnitude(q + x); });
            const double distance = differences == 0.0 ? 0.0 : differences / total;
            return rounded(distance, distance * 2.0 * roundings);
        }
        case JENSENSHANNON: {
            double terms = 0.0, size = 0.0;
            bool are_equal = true;
            for (int i = 0; i < dim; ++i) {
                const double q = query[i], x = wide(row[i]), middle = 0.5 * (q + x);
                are_equal &= q == x;
                size += std::fabs(q) + std::fabs(x);
                terms += divergence(q, middle) + divergence(x, middle);
            }
            // The logarithms of 1 are 0; otherwise those of a feature err by some units of its mean.
            return are_equal ? Score{0.0f, true} : rounded(0.5 * terms, size * 4.0 * (dim + 32) * UNIT_64);
        }
        default: {
            const double sum = sum_of(query, row, dim, difference), distance = metric == GOWER ? sum / dim : sum;
            const Score result = rounded(distance, distance * roundings);
            return !result.sure && sums_are_exact(query, row, dim, sum) ? rounded(distance, 0.0) : result;
        }
    }
}
