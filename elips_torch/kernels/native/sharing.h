// How threads share the rows and the queries of a scan.
#pragma once

#include <omp.h>

#include <algorithm>

#include "arguments.h"
#include "probed_lists.h"
#include "products.h"
#include "reservoir.h"

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

// Scan all rows, or the lists, by all threads. `make` makes what a thread scans with; `before` is called by
// each thread before, and says whether it has done its share of what all need.
template <class Make, class Before>
bool share(const Arguments& a, const ListQueries& lists, Reservoir* reservoirs, Make make, Before before) {
    bool ready = true;
    int64_t next = 0;
#pragma omp parallel num_threads(a.n_threads) if (a.n_threads > 1)
    {
        const int thread = omp_get_thread_num(), n_threads = omp_get_num_threads();
        const bool splits_rows = a.n_parts > 1;
        int first = 0, last = a.n_queries;
        if (!splits_rows) {
            // Whole blocks of queries, as evenly as they go.
            const int64_t wide = a.probes ? 1 : MOST_VECTORS * LANES, blocks = (a.n_queries + wide - 1) / wide;
            first = static_cast<int>(std::min<int64_t>(a.n_queries, blocks * thread / n_threads * wide));
            last = static_cast<int>(std::min<int64_t>(a.n_queries, blocks * (thread + 1) / n_threads * wide));
        }
        const int part = splits_rows ? thread : 0;
        auto work = make(part);
        const bool mine = first < last;
        // A thread without memory leaves its share undone: then all fails.
        const bool has_shared = before();
        const bool prepared = has_shared && (!mine || work.prepare(reservoirs + int64_t(part) * a.n_queries, first, last));
        if (!prepared) {
#pragma omp atomic write
            ready = false;
        }
        const int64_t n = a.probes ? lists.n : work.n_chunks(), stride = stride_of(n);
        if (prepared && mine && !a.probes) work.take(nullptr, first, last - first, 0);
        for (int64_t i = 0; prepared && mine; ++i) {
            int64_t number = i;
            if (splits_rows) {
#pragma omp atomic capture
                number = next++;
            }
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
    }
    return ready;
}
