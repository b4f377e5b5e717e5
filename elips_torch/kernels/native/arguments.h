// What a search takes.
#pragma once

#include <cstdint>

#include "grid.h"

extern "C" {

// All pointers are to contiguous memory that outlives the call.
struct Arguments {
    // The plane: (N, D) codes and (N, 4) scale, residual, norm and bias. Null where packed
    // rows are decoded to be screened, and where distances are of the vectors.
    const void* codes;
    const float* terms;
    const int64_t* names;  // (N,), what callers call each row; null where that is its number
    int64_t n_rows;
    // Inverted lists: null, or (L,) first slot and number of slots of each; (S,) the row in each slot; and
    // (Q, P) lists that each query searches, -1 for none. Without them all rows are searched.
    const int64_t* list_starts;
    const int64_t* list_sizes;
    const int64_t* slots;
    const int64_t* probes;
    // Or the search, of the same queries, that finds these lists: its k is the number of probes. It takes
    // its queries, and what is made of them, from here.
    const Arguments* coarse;
    int64_t n_lists;
    int64_t n_slots;
    int64_t n_probes;
    // The queries (Q, D) as callers have them, of which codes and what follows are made here; or null, and
    // the coded queries: (Q, D) codes; (3, Q) scale and factors of residual and norm.
    const void* source;
    const float* mean;  // (D,), as Coding has it, and two numbers more
    double rounded;  // of distances and differences instead: the share by which a sum in float32 may err
    double largest;
    double power;  // exponent of LP
    double step;   // of codes whose differences are summed
    const void* query_codes;
    const float* query_terms;
    const double* rounding;  // (Q,)
    const double* offsets;   // (Q,)
    const uint8_t* usable;   // (Q,)
    // What a query may see, by the rows' names: null for everything, else bytes (N,) or, by rows of a matrix, (*, N); and
    // (Q, M) row numbers to leave out, ascending.
    const uint8_t* mask;
    const int64_t* mask_rows;  // (Q,), which row of the mask; null where all share one
    int64_t mask_stride;       // bytes between rows of the mask
    int64_t mask_step;         // bytes between the entries of a row
    const int64_t* exclude;
    int64_t n_excluded;
    // (Q, C), the rows that elips_rank chooses from; what is no number of a row is none.
    const int64_t* candidates;
    int64_t n_candidates;
    // (Q,): all rows are sought whose scores are better than that, instead of the k best; or null.
    const float* radius;
    // The vectors: (N, D) float32, float16 or bfloat16; (Q, D) float64; order of ties by name, or null.
    const void* vectors;
    Packed packed;
    Grid grid;
    const double* queries;
    const int64_t* ranks;
    void* memory;  // (3, T, Q, C + SPARE) numbers of four bytes; null where nobody reads it after
    // Results: (Q, K) each; and (2, Q), the status of each query and how many rows survived, whose numbers
    // lie in the first reservoir of the query at the beginning of the memory. Where a radius is given: the latter
    // alone; then these rows are replaced by their names, best first, and their scores are in the second part of the
    // memory. Where a score is in doubt, it is NaN, and the rows are as they were kept. Where all are certain, those
    // of the first query come before those of the next, without gaps. Of a query that had no room: how many it met.
    float* scores;
    int64_t* found;
    int32_t* status;
    int64_t most_scored;  // rows that a reservoir may score to tell them apart, before its query is left open
    int64_t* scored;      // where how many all queries took so is written; null where nobody asks
    float slack;
    int32_t dim;
    int32_t n_queries;
    int32_t k;
    int32_t capacity;
    int32_t n_threads;
    int32_t n_parts;  // T: 1 where threads share the queries among them, else the number of threads
    int32_t metric;
    int32_t code_type;    // 0 float32, 1 int8, 2 bfloat16
    int32_t vector_type;  // 0 float32, 1 float16, 2 bfloat16
    int32_t source_type;  // these, or 3 float64
    int32_t is_exact;        // similarities of the codes are those of the vectors
    int32_t codes_in_slots;  // codes and terms are (S, D) and (S, 4), those of the row in each slot
};

enum Status : int32_t { CERTIFIED = 0, UNCERTIFIED = 1, UNSURE = 2 };
}

// Whether rows are decoded, or coded on a grid, where they are screened.
static inline bool unpacks(const Arguments& a) { return a.packed.packing && !a.codes; }

static inline bool is_row(const Arguments& a, int64_t row) { return static_cast<uint64_t>(row) < static_cast<uint64_t>(a.n_rows); }

static inline int64_t name_of(const Arguments& a, int64_t row) { return a.names ? a.names[row] : row; }
