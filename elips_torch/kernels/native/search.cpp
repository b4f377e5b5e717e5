// Exact search by the products of codes, or by distances: one pass over the rows, survivors in registers' reach.
//
// Every similarity is bounded from above where it is computed and compared with its query's
// threshold; the few that reach it are kept with both bounds. When a query has kept enough, the k-th
// best lower bound becomes its threshold, and what lies below it is dropped. In the end the survivors
// are scored by the definition and sorted. Thresholds only decide how much is kept, never the result. Rows within a
// radius are found alike, by a threshold that is known from the first row on.

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "arguments.h"
#include "assign.h"
#include "candidates.h"
#include "coded_here.h"
#include "distance_queries.h"
#include "distance_scan.h"
#include "linear_map.h"
#include "memory.h"
#include "outcome.h"
#include "ranking.h"
#include "reservoir.h"
#include "scan.h"
#include "sharing.h"
#include "team.h"
#include "within.h"

namespace {

// More queries, of all rows or on average for each list, take products of decoded rows (measured).
constexpr int64_t MOST_LOOKING_UP = 20, MOST_LOOKING_UP_LISTS = 16;

template <class Ranking>
bool rank_with(const Arguments& a, Reservoir* reservoirs) {
    std::atomic<bool> ready{true};
    // Few queries differ in what they have kept.
    Pieces pieces(a.n_queries, std::clamp(a.n_queries / (8 * a.n_threads), 1, 4));
    Team::run(std::min(a.n_threads, a.n_queries), [&](int) {
        if (!pieces.are_left()) return;
        Ranking ranking(a);
        if (!ranking.is_ready()) {
            ready = false;
            return;
        }
        for (int64_t q, last; pieces.take(q, last);)
            for (; q < last; ++q) ranking.query(q, reservoirs);
    });
    return ready;
}

template <class Value>
bool rank(const Arguments& a, Reservoir* reservoirs) {
    return a.radius ? rank_with<RangeRanking<Value>>(a, reservoirs) : rank_with<Ranking<Value>>(a, reservoirs);
}

template <class Code>
bool scan(const Arguments& a, Reservoir* reservoirs, float* limits) {
    ListQueries lists;
    if (a.probes && !lists.fill(a)) return false;
    ByteTables tables;
    const bool few = a.probes ? int64_t(a.n_queries) * a.n_probes <= MOST_LOOKING_UP_LISTS * lists.n
                              : a.n_queries <= MOST_LOOKING_UP;
    const bool looks_up = std::is_same_v<Code, int8_t> && few && ByteTables::serve(a);
    if (looks_up && !tables.make(a)) return false;
    return share(a, lists, reservoirs,
                 [&](int part) { return Scan<Code>(a, part, limits, looks_up ? &tables : nullptr); });
}

template <class Distance>
bool scan_distances(const Arguments& a, Reservoir* reservoirs, float* limits) {
    ListQueries lists;
    if (a.probes && !lists.fill(a)) return false;
    return share(a, lists, reservoirs, [&](int part) { return DistanceScan<Distance>(a, part, limits); });
}

bool scan_distances(const Arguments& a, Reservoir* reservoirs, float* limits) {
    switch (a.metric) {
        case L2: return scan_distances<Powers<2>>(a, reservoirs, limits);
        case LINF: return scan_distances<LargestDifference>(a, reservoirs, limits);
        case CANBERRA: return scan_distances<Canberra>(a, reservoirs, limits);
        case BRAYCURTIS: return scan_distances<BrayCurtis>(a, reservoirs, limits);
        case JENSENSHANNON: return scan_distances<JensenShannon>(a, reservoirs, limits);
        case LP: break;
        default: return scan_distances<Differences>(a, reservoirs, limits);
    }
    switch (whole_power(a.power)) {
        case 1: return scan_distances<Differences>(a, reservoirs, limits);
        case 2: return scan_distances<Powers<2>>(a, reservoirs, limits);
        case 3: return scan_distances<Powers<3>>(a, reservoirs, limits);
        case 4: return scan_distances<Powers<4>>(a, reservoirs, limits);
        default: return scan_distances<AnyPower>(a, reservoirs, limits);
    }
}

int outcome_of(const Arguments& a) {
    if (!std::all_of(a.status, a.status + a.n_queries, [](int32_t s) { return s == CERTIFIED; })) return OPEN;
    if (a.radius) return DONE;
    // The last place of a query is the first that stays empty.
    for (int64_t q = 0; q < a.n_queries; ++q)
        if (a.found[(q + 1) * a.k - 1] < 0) return SHORT;
    return DONE;
}

int search(Arguments a) {
    if (unpacks(a) && a.code_type != (a.grid.steps ? 1 : 0)) return UNKNOWN_TYPE;
    const bool of_differences = is_distance(a.metric) && a.codes;
    const bool by_distance = !a.codes && !a.packed.packing;
    if (of_differences && a.code_type == 0) return UNKNOWN_TYPE;
    if (by_distance && (a.metric == IP || a.metric == COSINE)) return UNKNOWN_TYPE;
    CodedHere coded;
    DistanceQueries plain;
    if (a.source) {
        const int outcome = by_distance ? plain.make(a) : coded.make(a);
        if (outcome != DONE) return outcome;
    }
    const int64_t n = int64_t(a.n_parts) * a.n_queries;
    Memory<float> memory;
    if (!a.memory) {
        memory = allocate<float>(3 * n * (a.capacity + SPARE));
        a.memory = memory.get();
    }
    Memory<Reservoir> reservoirs = allocate<Reservoir>(n);
    Memory<float> limits = allocate<float>(a.n_queries);
    if (!a.memory || !reservoirs || !limits) return NO_MEMORY;
    std::fill(reservoirs.get(), reservoirs.get() + n, Reservoir{});
    std::fill(limits.get(), limits.get() + a.n_queries, LOWEST);
    float* shared = a.n_parts > 1 ? limits.get() : nullptr;
    bool ready;
    if (by_distance) {
        ready = scan_distances(a, reservoirs.get(), shared);
    } else if (a.code_type == 0) {
        ready = scan<float>(a, reservoirs.get(), shared);
    } else if (a.code_type == 2 && of_differences) {
        ready = scan<BFloat>(a, reservoirs.get(), shared);
    } else if (a.code_type == 1 && HAS_INT8) {
#if defined(__AVX512VNNI__)
        if (of_differences)
            ready = scan<StepCode>(a, reservoirs.get(), shared);
        else if (unpacks(a) && a.packed.packing == SCALAR8)
            ready = scan<uint8_t>(a, reservoirs.get(), shared);
        else
            ready = scan<int8_t>(a, reservoirs.get(), shared);
#endif
    } else {
        return UNKNOWN_TYPE;
    }
    if (!ready) return NO_MEMORY;
    if (a.scored) {
        *a.scored = 0;
        for (int64_t i = 0; i < n; ++i) *a.scored += reservoirs[i].scored;
    }
    switch (a.vector_type) {
        case 0: ready = rank<float>(a, reservoirs.get()); break;
        case 1: ready = rank<Half>(a, reservoirs.get()); break;
        case 2: ready = rank<BFloat>(a, reservoirs.get()); break;
        default: return UNKNOWN_TYPE;
    }
    if (!ready) return NO_MEMORY;
    const int outcome = outcome_of(a);
    if (a.radius && outcome == DONE) compact(a, reservoirs.get());
    return outcome;
}

// Find the lists to search, then search them. A query whose lists are not certain has no certificate.
int search_nearest_lists(Arguments a) {
    Arguments coarse = *a.coarse;
    const int64_t n = int64_t(a.n_queries) * coarse.k;
    Memory<int64_t> probes = allocate<int64_t>(n);
    Memory<float> scores = allocate<float>(n);
    Memory<int32_t> status = allocate<int32_t>(2 * int64_t(a.n_queries));
    if (!probes || !scores || !status) return NO_MEMORY;
    coarse.source = a.source;
    coarse.found = probes.get();
    coarse.scores = scores.get();
    coarse.status = status.get();
    const int found = search(coarse);
    if (found == NO_MEMORY || found == UNKNOWN_TYPE) return found;
    a.probes = probes.get();
    const int outcome = search(a);
    if (found != OPEN || (outcome != DONE && outcome != SHORT && outcome != OPEN)) return outcome;
    for (int64_t q = 0; q < a.n_queries; ++q)
        if (status[q] != CERTIFIED) a.status[q] = UNCERTIFIED;
    return OPEN;
}

}  // namespace

extern "C" {

// Sizes of the structures, for callers to compare with theirs.
int elips_size(int which) {
    switch (which) {
        case 0: return static_cast<int>(sizeof(Arguments));
        case 1: return static_cast<int>(sizeof(Coding));
        case 2: return static_cast<int>(sizeof(Packed));
        case 3: return static_cast<int>(sizeof(Grid));
        case 4: return static_cast<int>(sizeof(GridTerms));
        case 5: return static_cast<int>(sizeof(Assigning));
        default: return static_cast<int>(sizeof(LinearMap));
    }
}

// Fills the codes of queries and their terms, as elips_search does where it is given none.
int elips_code(const Coding* coding) { return code_queries(*coding); }

// Fills the terms of rows on a grid.
int elips_terms(const GridTerms* terms) { return make_terms(*terms); }

// Fills the labels.
int elips_assign(const Assigning* assigning) {
    if (assigning->code_type == 0) return assigning::run<float>(*assigning);
#if defined(__AVX512VNNI__)
    if (assigning->code_type == 1) return assigning::run<int8_t>(*assigning);
#endif
    return UNKNOWN_TYPE;
}

// Fills the mapped vectors, but for some entries where the outcome is OPEN.
int elips_map(const LinearMap* map) { return map_any_vectors(*map); }

// Fills scores, found and status, which says more where the outcome is OPEN.
int elips_search(const Arguments* arguments) {
    return arguments->coarse ? search_nearest_lists(*arguments) : search(*arguments);
}

// Fills scores, found and, where there is one, the status (Q,), which says more where the outcome is OPEN.
int elips_rank(const Arguments* arguments) { return rank_any_candidates(*arguments); }
}
