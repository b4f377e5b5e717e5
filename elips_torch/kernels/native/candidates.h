// The k best of rows that others have chosen for each query, scored by the definition and sorted.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>

#include "arguments.h"
#include "memory.h"
#include "outcome.h"
#include "scorer.h"
#include "team.h"

// Features of candidates whose scoring takes longer than waking threads.
constexpr int64_t WORTH_RANKING_TOGETHER = 1 << 17;

template <class Source, class Value>
class CandidateRanking {
   public:
    explicit CandidateRanking(const Arguments& a)
        : a_(a), scorer_(a), query_(allocate<double>(a.dim)), found_(allocate<Found>(a.n_candidates)) {}

    bool is_ready() const { return query_ && found_ && scorer_.is_ready(); }

    // Returns DONE; SHORT where there are fewer rows than asked for; OPEN where a score is in doubt, as all are of a
    // query that is not finite.
    Outcome query(int64_t q) {
        const Source* source = static_cast<const Source*>(a_.source) + q * a_.dim;
        bool sure = true;
        for (int i = 0; i < a_.dim; ++i) {
            query_[i] = wide(source[i]);
            sure &= std::isfinite(query_[i]);
        }
        scorer_.take(query_.get());
        const int64_t* rows = a_.candidates + q * a_.n_candidates;
        const int64_t ahead = scorer_.AHEAD, total = a_.n_candidates;
        for (int64_t i = 0; i < std::min(ahead, total); ++i) prefetch(rows[i]);
        int64_t n = 0;
        for (int64_t i = 0; i < total; ++i) {
            if (i + ahead < total) prefetch(rows[i + ahead]);
            if (!is_row(a_, rows[i])) continue;
            const Score score = scorer_.of(rows[i], 0.0f);
            sure &= score.sure;
            found_[n++] = scorer_.found(rows[i], score.value);
        }
        write(q, n);
        if (a_.status) a_.status[q] = sure ? CERTIFIED : UNSURE;
        return !sure ? OPEN : n < a_.k ? SHORT : DONE;
    }

   private:
    void prefetch(int64_t row) const {
        if (is_row(a_, row)) scorer_.prefetch(row);
    }

    void write(int64_t q, int64_t n) {
        float* scores = a_.scores + q * a_.k;
        int64_t* found = a_.found + q * a_.k;
        const bool descends = a_.metric == IP || a_.metric == COSINE;
        const int64_t kept = std::min<int64_t>(n, a_.k);
        if (kept < n) std::nth_element(found_.get(), found_.get() + kept, found_.get() + n);
        std::sort(found_.get(), found_.get() + kept);
        for (int64_t i = 0; i < kept; ++i) {
            scores[i] = (descends ? -found_[i].key : found_[i].key) + 0.0f;
            found[i] = found_[i].name;
        }
        std::fill(scores + kept, scores + a_.k, descends ? LOWEST : HIGHEST);
        std::fill(found + kept, found + a_.k, -1);
    }

    const Arguments& a_;
    Scorer<Value> scorer_;
    Memory<double> query_;
    Memory<Found> found_;
};

template <class Source, class Value>
static int rank_candidates(const Arguments& a) {
    std::atomic<bool> ready{true}, sure{true}, all_found{true};
    Pieces pieces(a.n_queries, std::clamp(a.n_queries / (8 * a.n_threads), 1, 64));
    const bool worth = int64_t(a.n_queries) * a.n_candidates * a.dim >= WORTH_RANKING_TOGETHER;
    Team::run(worth ? std::min(a.n_threads, a.n_queries) : 1, [&](int) {
        if (!pieces.are_left()) return;
        CandidateRanking<Source, Value> ranking(a);
        if (!ranking.is_ready()) {
            ready = false;
            return;
        }
        for (int64_t q, last; pieces.take(q, last);)
            for (; q < last; ++q) {
                const Outcome outcome = ranking.query(q);
                if (outcome == OPEN) sure = false;
                if (outcome == SHORT) all_found = false;
            }
    });
    return !ready ? NO_MEMORY : !sure ? OPEN : all_found ? DONE : SHORT;
}

template <class Source>
static int rank_candidates_of(const Arguments& a) {
    switch (a.vector_type) {
        case 0: return rank_candidates<Source, float>(a);
        case 1: return rank_candidates<Source, Half>(a);
        case 2: return rank_candidates<Source, BFloat>(a);
        default: return UNKNOWN_TYPE;
    }
}

static int rank_any_candidates(const Arguments& a) {
    switch (a.source_type) {
        case 0: return rank_candidates_of<float>(a);
        case 1: return rank_candidates_of<Half>(a);
        case 2: return rank_candidates_of<BFloat>(a);
        case 3: return rank_candidates_of<double>(a);
        default: return UNKNOWN_TYPE;
    }
}
