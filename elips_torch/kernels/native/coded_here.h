// Queries as codes, where callers give them as they are.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>

#include "arguments.h"
#include "coding.h"
#include "memory.h"
#include "outcome.h"
#include "team.h"

static int code_queries(const Coding& c) {
    if (c.code_type != 0 && c.code_type != 1) return UNKNOWN_TYPE;
    if (is_distance(c.metric) && !(c.step > 0.0)) return UNKNOWN_TYPE;
    double mean_length = 0.0;
    for (int i = 0; i < c.dim; ++i) mean_length += double(c.mean[i]) * c.mean[i];
    mean_length = std::sqrt(mean_length);
    std::atomic<bool> ready{true};
    const bool shares = int64_t(c.n_queries) * c.dim > WORTH_SHARING;
    Pieces pieces(c.n_queries, c.n_queries / (4 * c.n_threads));
    Team::run(shares ? c.n_threads : 1, [&](int) {
        Memory<double> wide = allocate<double>(c.dim);
        if (!wide) {
            ready = false;
            return;
        }
        for (int64_t q = 0, last = 0; q < last || pieces.take(q, last); ++q) {
            if (is_distance(c.metric) && c.code_type == 0)
                code_query_of_differences<float>(c, q);
            else if (is_distance(c.metric))
                code_query_of_differences<int8_t>(c, q);
            else if (c.code_type == 0)
                code_query<float>(c, q, mean_length, wide.get());
            else
                code_query<int8_t>(c, q, mean_length, wide.get());
        }
    });
    return ready ? DONE : NO_MEMORY;
}

// Queries as float64 and as codes, where callers give them as they are.
class CodedHere {
   public:
    // Returns as elips_search does.
    int make(Arguments& a) {
        const int64_t q = a.n_queries, n = q * a.dim;
        wide_ = allocate<double>(n + 2 * q);
        codes_ = allocate<float>(n);
        terms_ = allocate<float>(3 * q);
        usable_ = allocate<uint8_t>(q);
        if (!wide_ || !codes_ || !terms_ || !usable_) return NO_MEMORY;
        double* wide = wide_.get();
        switch (a.source_type) {
            case 0: widen<float>(a.source, n, wide); break;
            case 1: widen<Half>(a.source, n, wide); break;
            case 2: widen<BFloat>(a.source, n, wide); break;
            case 3: widen<double>(a.source, n, wide); break;
            default: return UNKNOWN_TYPE;
        }
        Coding c;
        c.queries = wide;
        c.mean = a.mean;
        c.steps = a.grid.steps;
        c.codes = codes_.get();
        c.terms = terms_.get();
        c.rounding = wide + n;
        c.offsets = c.rounding + q;
        c.usable = usable_.get();
        c.rounded = a.rounded;
        c.largest = a.largest;
        c.step = a.step;
        c.dim = a.dim;
        c.n_queries = a.n_queries;
        c.metric = a.metric;
        // Short floats of rows meet float32.
        c.code_type = a.code_type == 1 ? 1 : 0;
        c.n_threads = a.n_threads;
        a.queries = wide;
        a.query_codes = c.codes;
        a.query_terms = c.terms;
        a.rounding = c.rounding;
        a.offsets = c.offsets;
        a.usable = c.usable;
        const int outcome = code_queries(c);
        if (outcome == DONE && a.grid.scalars) ignore(a.grid.scalars, q, a.dim);
        return outcome;
    }

   private:
    // Features of scalars that do not count add nothing to products.
    void ignore(const uint8_t* counts, int64_t n_queries, int dim) {
        auto* codes = reinterpret_cast<uint8_t*>(codes_.get());
        for (int64_t q = 0; q < n_queries; ++q, codes += dim)
            for (int i = 0; i < dim; ++i) codes[i] &= counts[i];
    }

    template <class Value>
    static void widen(const void* source, int64_t n, double* out) {
        const Value* values = static_cast<const Value*>(source);
        for (int64_t i = 0; i < n; ++i) out[i] = wide(values[i]);
    }

    Memory<double> wide_;
    Memory<float> codes_, terms_;
    Memory<uint8_t> usable_;
};
