// Distances in float32, a vector of lanes at a time: lanes are queries, or features of one query.
//
// Each class says how a feature adds to the sums of a pair, and what distance they make. NEEDS_RANGE: what is
// said of its error holds for features that are 0 or neither tiny nor huge, see `distance_bounds.py`; the others
// give a distance that is not finite wherever nothing is known. SIGNED: features may be negative.
#pragma once

#include <cmath>

#include "arguments.h"
#include "lanes.h"
#include "logarithm.h"
#include "reservoir.h"
#include "rescore.h"

// Magnitudes that these are sure of, beside zero: 2**-100 to 2**100.
constexpr uint32_t LEAST_BITS = (127u - 100u) << 23, MOST_BITS = (127u + 100u) << 23;
// What stands for a sum of magnitudes that is 0: less than any other.
constexpr float LESS_THAN_ANY = FLOOR / 4.0f;

// The exponent of LP where it is whole and small, else 0.
static inline int whole_power(double power) {
    return power >= 1.0 && power <= 4.0 && power == std::floor(power) ? static_cast<int>(power) : 0;
}

struct OneSum {
    static constexpr bool NEEDS_RANGE = false, SIGNED = true;
    using Sums = Floats;

    explicit OneSum(const Arguments&) {}
    static Sums start() { return all(0.0f); }
    static Floats distance(Sums sums) { return sums; }
    // Of one pair, the sums of whose features are in the lanes.
    static float across(Sums sums) { return sum(sums); }
};

struct Differences : OneSum {
    using OneSum::OneSum;
    void add(Sums& sums, Floats q, Floats x) const { sums = plus(sums, magnitude(minus(q, x))); }
};

struct LargestDifference : OneSum {
    // NaN is in no order.
    static constexpr bool NEEDS_RANGE = true;
    using OneSum::OneSum;
    void add(Sums& sums, Floats q, Floats x) const { sums = larger(sums, magnitude(minus(q, x))); }
    static float across(Sums sums) { return largest(sums); }
};

template <int POWER>
struct Powers : OneSum {
    using OneSum::OneSum;
    void add(Sums& sums, Floats q, Floats x) const {
        const Floats size = magnitude(minus(q, x));
        sums = times_plus(raised<POWER / 2>(size), raised<POWER - POWER / 2>(size), sums);
    }

   private:
    template <int N>
    static Floats raised(Floats x) {
        if constexpr (N == 1)
            return x;
        else
            return times(raised<N / 2>(x), raised<N - N / 2>(x));
    }
};

struct AnyPower : OneSum {
    static constexpr bool NEEDS_RANGE = true;
    explicit AnyPower(const Arguments& a) : OneSum(a), power_(all(static_cast<float>(a.power))) {}
    void add(Sums& sums, Floats q, Floats x) const {
        const Floats size = magnitude(minus(q, x));
        sums = plus(sums, unless_zero(size, exp2(times(power_, log2(size)))));
    }

   private:
    const Floats power_;
};

struct Canberra : OneSum {
    static constexpr bool NEEDS_RANGE = true;
    using OneSum::OneSum;
    void add(Sums& sums, Floats q, Floats x) const {
        const Floats size = plus(magnitude(q), magnitude(x));
        sums = plus(sums, divided(magnitude(minus(q, x)), larger(size, all(LESS_THAN_ANY))));
    }
};

struct BrayCurtis : OneSum {
    static constexpr bool NEEDS_RANGE = true;
    struct Sums {
        Floats difference, total;
    };
    using OneSum::OneSum;
    static Sums start() { return {all(0.0f), all(0.0f)}; }
    void add(Sums& sums, Floats q, Floats x) const {
        sums.difference = plus(sums.difference, magnitude(minus(q, x)));
        sums.total = plus(sums.total, magnitude(plus(q, x)));
    }
    static Floats distance(Sums sums) {
        return unless_zero(sums.difference, divided(sums.difference, sums.total));
    }
    static float across(Sums sums) {
        const float difference = sum(sums.difference);
        return difference == 0.0f ? 0.0f : difference / sum(sums.total);
    }
};

struct JensenShannon : OneSum {
    static constexpr bool NEEDS_RANGE = true, SIGNED = false;
    using OneSum::OneSum;
    void add(Sums& sums, Floats q, Floats x) const {
        const Floats middle = larger(times(plus(q, x), all(0.5f)), all(LESS_THAN_ANY));
        const Floats inverse = divided(all(1.0f), middle);
        sums = times_plus(q, ln_of_ratio(times(q, inverse)), sums);
        sums = times_plus(x, ln_of_ratio(times(x, inverse)), sums);
    }
    static Floats distance(Sums sums) { return times(sums, all(0.5f)); }
    static float across(Sums sums) { return 0.5f * sum(sums); }

   private:
    // What is less adds nothing, as 0 does.
    static Floats ln_of_ratio(Floats ratio) { return ln(larger(ratio, all(FLOOR))); }
};
