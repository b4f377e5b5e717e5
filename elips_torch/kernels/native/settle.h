// Rows that bounds cannot tell apart, such as many equal ones, told apart by the definition.
#pragma once

#include <algorithm>

#include "arguments.h"
#include "memory.h"
#include "reservoir.h"
#include "scorer.h"

// Drop all but the k best of the rows that a query has kept; the others come after these for certain, whatever
// else is met. Returns whether that could be done.
template <class Value>
__attribute__((noinline)) static bool settle(const Arguments& a, int64_t q, Reservoir& r) {
    struct Placed {
        Found found;
        int place;
    };
    // There, a finer search is cheaper.
    if (r.n <= a.k || r.scored > a.most_scored) return false;
    Scorer<Value> scorer(a);
    Memory<Placed> placed = allocate<Placed>(r.n);
    if (!scorer.is_ready() || !placed) return false;
    scorer.take(q);
    Score score{};
    for (int i = 0; i < std::min(scorer.AHEAD, r.n); ++i) scorer.prefetch(r.rows[i]);
    for (int i = 0; i < r.n; ++i) {
        if (i + scorer.AHEAD < r.n) scorer.prefetch(r.rows[i + scorer.AHEAD]);
        // Many equal rows are why most queries come here.
        if (i == 0 || !scorer.are_same(r.rows[i], r.rows[i - 1])) {
            score = scorer.of(r.rows[i], r.upper[i]);
            ++r.scored;
        }
        if (!score.sure) return false;
        placed[i] = {scorer.found(r.rows[i], score.value), i};
    }
    Placed* first = placed.get();
    std::nth_element(first, first + a.k - 1, first + r.n,
                     [](const Placed& x, const Placed& y) { return x.found < y.found; });
    // Ascending places: a row moves to where no other is needed any more.
    std::sort(first, first + a.k, [](const Placed& x, const Placed& y) { return x.place < y.place; });
    for (int i = 0; i < a.k; ++i) {
        const int from = first[i].place;
        r.rows[i] = r.rows[from];
        r.upper[i] = r.upper[from];
        r.lower[i] = r.lower[from];
    }
    r.n = a.k;
    return true;
}

static inline bool settle_any(const Arguments& a, int64_t q, Reservoir& r) {
    switch (a.vector_type) {
        case 0: return settle<float>(a, q, r);
        case 1: return settle<Half>(a, q, r);
        case 2: return settle<BFloat>(a, q, r);
        default: return false;
    }
}
