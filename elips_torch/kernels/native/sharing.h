// How threads share the rows and the queries of a scan.
#pragma once

#include <algorithm>
#include <atomic>

#include "arguments.h"
#include "probed_lists.h"
#include "products.h"
#include "reservoir.h"
#include "team.h"

// Chunks in an order that meets rows from everywhere early, whatever their order is.
static inline int64_t stride_of(int64_t n) {
    int64_t stride = static_cast<int64_t>(n * 0.6180339887498949) | 1;
    auto gcd = [](int64_t x, int64_t y) {
        while (y) std::swap(x %= y, y);
        return x;
    };
    while (n > 1 && gcd(stride, n) != 1) ++stride;
    return stride;
}

// Scan all rows, or the lists, by all threads. `make` makes what a thread scans with.
template <class Make>
bool share(const Arguments& a, const ListQueries& lists, Reservoir* reservoirs, Make make) {
    std::atomic<bool> ready{true}, is_over{false};
    std::atomic<int64_t> next{0};
    const bool splits_rows = a.n_parts > 1;
    Team::run(a.n_threads, [&](int thread) {
        int first = 0, last = a.n_queries;
        if (!splits_rows) {
            // Whole blocks of queries, as evenly as they go.
            const int64_t wide = a.probes ? 1 : MOST_VECTORS * LANES, blocks = (a.n_queries + wide - 1) / wide;
            first = static_cast<int>(std::min<int64_t>(a.n_queries, blocks * thread / a.n_threads * wide));
            last = static_cast<int>(std::min<int64_t>(a.n_queries, blocks * (thread + 1) / a.n_threads * wide));
        }
        const int part = splits_rows ? thread : 0;
        // What was kept is gathered in the first part.
        if (first == last || (part > 0 && is_over)) return;
        auto work = make(part);
        if (!work.prepare(reservoirs + int64_t(part) * a.n_queries, first, last)) {
            // A thread without memory leaves its share undone: then all fails.
            ready = false;
            return;
        }
        const int64_t n = a.probes ? lists.n : work.n_chunks(), stride = stride_of(n);
        if (!a.probes) work.take(nullptr, first, last - first, 0);
        for (int64_t i = 0;; ++i) {
            const int64_t number = splits_rows ? next++ : i;
            if (number >= n) break;
            if (!a.probes) {
                work.chunk(static_cast<int64_t>((static_cast<__int128>(number) * stride) % n));
                continue;
            }
            const int32_t* begin = lists.queries.get() + lists.starts[number];
            const int32_t* end = lists.queries.get() + lists.starts[number + 1];
            if (!splits_rows) {
                begin = std::lower_bound(begin, end, first);
                end = std::lower_bound(begin, end, last);
            }
            const int64_t list = lists.lists[number];
            if (begin == end || !a.list_sizes[list]) continue;
            work.take(begin, 0, static_cast<int>(end - begin), list);
            work.list(list);
        }
        is_over = splits_rows;
    });
    return ready;
}
