// Linear maps of few vectors: sums in float64, and whether their rounding to float32 is beyond doubt.
#pragma once

#include <cmath>
#include <cstdint>

#include "memory.h"
#include "outcome.h"
#include "rescore.h"

extern "C" {

// All pointers are to contiguous memory that outlives the call.
struct LinearMap {
    const void* vectors;  // (N, I)
    const float* matrix;  // (O, I)
    const float* before;  // (I,), what is subtracted from the vectors; or null
    const float* after;   // (O,), what is added to the products; or null
    float* mapped;        // (N, O); NaN where the rounding is in doubt
    double slack;         // the share of its terms' size that a sum may err by, in any order
    int64_t n;
    int32_t n_in;
    int32_t n_out;
    int32_t vector_type;  // 0 float32, 1 float16, 2 bfloat16, 3 float64
};
}

// Each row of the matrix is read once, for all vectors.
template <class Value>
static int map_vectors(const LinearMap& m) {
    Memory<double> wide_vectors = allocate<double>(m.n * m.n_in), lengths = allocate<double>(m.n);
    if (!wide_vectors || !lengths) return NO_MEMORY;
    const Value* values = static_cast<const Value*>(m.vectors);
    double* to = wide_vectors.get();
    for (int64_t v = 0; v < m.n; ++v) {
        double square = 0.0;
        for (int i = 0; i < m.n_in; ++i, ++to) {
            *to = m.before ? wide(*values++) - m.before[i] : wide(*values++);
            square += *to * *to;
        }
        lengths[v] = std::sqrt(square);
    }
    bool sure = true;
    for (int j = 0; j < m.n_out; ++j) {
        const double offset = m.after ? m.after[j] : 0.0;
        for (int64_t v = 0; v < m.n; ++v) {
            const Sums sums = sums_of<float, false>(wide_vectors.get() + v * m.n_in, m.matrix + int64_t(j) * m.n_in, m.n_in);
            const double sum = sums.product + offset;
            const double error = m.slack * (lengths[v] * std::sqrt(sums.row_square) + std::fabs(offset));
            const float low = static_cast<float>(sum - error), high = static_cast<float>(sum + error);
            sure &= low == high;
            // Zero has no sign.
            m.mapped[v * m.n_out + j] = low == high ? low + 0.0f : std::numeric_limits<float>::quiet_NaN();
        }
    }
    return sure ? DONE : OPEN;
}

static int map_any_vectors(const LinearMap& m) {
    switch (m.vector_type) {
        case 0: return map_vectors<float>(m);
        case 1: return map_vectors<Half>(m);
        case 2: return map_vectors<BFloat>(m);
        case 3: return map_vectors<double>(m);
        default: return UNKNOWN_TYPE;
    }
}
