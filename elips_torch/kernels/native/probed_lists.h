// The lists that queries search, and the rows in them.
#pragma once

#include <algorithm>

#include "arguments.h"
#include "memory.h"

// The lists that are probed, those first that are nearest to some query; and the queries of each, ascending.
struct ListQueries {
    int64_t n = 0;             // lists
    Memory<int64_t> lists;     // (n,)
    Memory<int64_t> starts;    // (n + 1,)
    Memory<int32_t> queries;

    bool fill(const Arguments& a) {
        const int64_t pairs = int64_t(a.n_queries) * a.n_probes, most = std::min(pairs, a.n_lists);
        Memory<int64_t> places = allocate<int64_t>(a.n_lists);
        lists = allocate<int64_t>(most);
        starts = allocate<int64_t>(most + 1);
        queries = allocate<int32_t>(pairs);
        if (!places || !lists || !starts || !queries) return false;
        std::fill(places.get(), places.get() + a.n_lists, 0);
        for (int64_t i = 0; i < pairs; ++i)
            if (is_list(a, a.probes[i])) ++places[a.probes[i]];
        // Rows that are near raise thresholds early. Probes are sorted by how near they are.
        int64_t total = 0;
        for (int64_t i = 0; i < pairs; ++i) {
            const int64_t list = a.probes[i % a.n_queries * a.n_probes + i / a.n_queries];
            if (!is_list(a, list) || places[list] <= 0) continue;
            lists[n] = list;
            starts[n++] = total;
            total += places[list];
            places[list] = -1;  // has been taken
        }
        starts[n] = total;
        for (int64_t i = 0; i < n; ++i) places[lists[i]] = starts[i];
        for (int64_t i = 0; i < pairs; ++i)
            if (is_list(a, a.probes[i])) queries[places[a.probes[i]]++] = static_cast<int32_t>(i / a.n_probes);
        return true;
    }

    static bool is_list(const Arguments& a, int64_t list) { return 0 <= list && list < a.n_lists; }
};

// Show the rows of a list, at most so many at a time: the first slot, the rows from there on, and how many.
template <class Visit>
void visit_list(const Arguments& a, int64_t number, int64_t most, Visit visit) {
    const int64_t start = a.list_starts[number], size = a.list_sizes[number];
    // Nobody may change lists while they are searched; where somebody has, most wrong slots are seen here, or
    // where a row of theirs is to be kept.
    if (start < 0 || size < 0 || start + size > a.n_slots) return;
    const bool reads_rows = !a.codes_in_slots && !a.packed.slot_places;
    bool is_wrong = false;
    for (int64_t slot = start; reads_rows && slot < start + size; ++slot) is_wrong |= !is_row(a, a.slots[slot]);
    if (is_wrong) return;
    for (int64_t done = 0; done < size; done += most)
        visit(start + done, a.slots + start + done, static_cast<int>(std::min(most, size - done)));
}
