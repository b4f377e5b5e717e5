// The nearest centroid of many vectors.
//
// Vectors lie in lanes, packed once; centroids are broadcast. Each product of codes gives an upper and
// a lower bound of the similarity; a vector's largest lower bound is kept in registers. Only centroids
// whose upper bound reaches it are looked at again: most often that is one, the nearest. The others are
// scored by the definition, the most promising first, since its score rules out most of the rest.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "products.h"
#include "outcome.h"
#include "reservoir.h"
#include "rescore.h"
#include "team.h"

extern "C" {

// All pointers are to contiguous memory that outlives the call.
struct Assigning {
    const void* vectors;     // (N, D) float32, float16 or bfloat16
    const float* centroids;  // (K, D)
    const float* mean;       // (D,), any point; the nearer to all, the finer the codes
    // Null, or memory for the coded vectors, for N and D rounded up to multiples of 64 and of 4: codes
    // (N, D) of the type's size and terms (4, N). Filled unless they are those of an earlier call with
    // the same vectors and mean.
    void* codes;
    float* terms;
    int64_t* labels;  // results (N,), -1 where undecided
    double rounded;   // roundoffs of float32 that a product may lose
    double largest;   // features of that size and more cannot be bounded
    int64_t n_vectors;
    int32_t n_centroids;
    int32_t dim;
    int32_t metric;
    int32_t code_type;    // 0 float32, 1 int8
    int32_t vector_type;  // 0 float32, 1 float16, 2 bfloat16
    int32_t is_coded;
    int32_t n_threads;
};
}

namespace assigning {

constexpr int VECTORS = 4;
constexpr int BLOCK = VECTORS * LANES;
// Vectors that meet the same centroids while those are in cache, and what of them stays there.
constexpr int BLOCKS_AT_ONCE = 4;
constexpr int64_t CHUNK_BYTES = 128 * 1024;
constexpr int MOST_CHUNK_ROWS = 960;
constexpr int ROWS = LANES == 16 ? 6 : 2;
// Centroids that a vector may leave open.
constexpr int MOST_OPEN = 64;
constexpr double SMALLEST_SCALE = 1.0 / (1ull << 60);
constexpr double LEAST_FACTOR = SMALLEST_SCALE * SMALLEST_SCALE;

struct alignas(64) Line {
    char bytes[64];
};

// Parts of one piece of memory, each at the start of a cache line.
class Memory {
   public:
    explicit Memory(int64_t bytes) : lines_(new (std::nothrow) Line[bytes / 64 + 1]) {}
    explicit operator bool() const { return lines_ != nullptr; }
    template <class T>
    T* take(int64_t n) {
        T* place = reinterpret_cast<T*>(lines_.get() + used_);
        used_ += lines(n * int64_t(sizeof(T)));
        return place;
    }
    static int64_t lines(int64_t bytes) { return (bytes + 63) / 64; }

   private:
    std::unique_ptr<Line[]> lines_;
    int64_t used_ = 0;
};

// Codes of the centroids, and what the bounds need of each, one array a term.
template <class Code>
struct Centroids {
    int64_t stride;
    Memory memory;
    Code* codes;
    float *scale, *residual, *norm, *bias, *rest;
    int* correction;
    double mean_length = 0.0;

    explicit Centroids(const Assigning& a)
        : stride(Memory::lines(a.dim * int64_t(sizeof(Code))) * 64 / int64_t(sizeof(Code))),
          memory((a.n_centroids * stride * int64_t(sizeof(Code))) + 6 * (4 * int64_t(a.n_centroids) + 64)) {
        if (!memory) return;
        codes = memory.take<Code>(a.n_centroids * stride);
        for (float** term : {&scale, &residual, &norm, &bias, &rest}) *term = memory.take<float>(a.n_centroids);
        correction = memory.take<int>(a.n_centroids);
        for (int i = 0; i < a.dim; ++i) mean_length += double(a.mean[i]) * a.mean[i];
        mean_length = std::sqrt(mean_length);
    }

    // Returns whether the centroid can be bounded.
    bool fill(const Assigning& a, int64_t number) {
        constexpr bool IS_INT8 = sizeof(Code) == 1;
        const float* centroid = a.centroids + number * a.dim;
        Code* code = codes + number * stride;
        const float* mean = a.mean;
        const int dim = a.dim;
        double length = 0.0;
#pragma omp simd reduction(+ : length)
        for (int i = 0; i < dim; ++i) length += double(centroid[i]) * centroid[i];
        const double factor = a.metric != COSINE ? 1.0 : length > 0.0 ? 1.0 / std::sqrt(length) : 0.0;
        double square = 0.0, most = 0.0;
#pragma omp simd reduction(+ : square) reduction(max : most)
        for (int i = 0; i < dim; ++i) {
            const double value = centroid[i] * factor - mean[i];
            square += value * value;
            most = std::fabs(value) > most ? std::fabs(value) : most;
        }
        // NaN anywhere is in the sum, and is not below.
        const bool usable = square < a.largest * a.largest && most < a.largest;
        const float step = IS_INT8 && usable ? static_cast<float>(std::max(most / 127.0, SMALLEST_SCALE)) : 1.0f;
        double left = 0.0;
        std::memset(code, 0, stride * sizeof(Code));
        const int n = usable ? dim : 0;
#pragma omp simd reduction(+ : left)
        for (int i = 0; i < n; ++i) {
            const double value = centroid[i] * factor - mean[i];
            const float coded = static_cast<float>(IS_INT8 ? std::rint(value / step) : value);  // 127 at most
            code[i] = static_cast<Code>(coded);
            const double rest = value - double(coded) * step;
            left += rest * rest;
        }
        // More than what float64 loses, and than rounding these to float32.
        const double widen = (1.0 + 4.0 * UNIT), lost = 1.0 / (1ull << 40);
        const double size = std::sqrt(square);
        scale[number] = step;
        residual[number] = static_cast<float>((std::sqrt(left) + size * lost) * widen + LEAST_FACTOR);
        norm[number] = static_cast<float>(size * widen + LEAST_FACTOR);
        bias[number] = a.metric == L2 ? static_cast<float>(-0.5 * square) : 0.0f;
        rest[number] = static_cast<float>(a.metric == L2 ? 8.0 * UNIT * widen * square : 0.0) + FLOOR;
        correction[number] = Product<Code>::correction(code, a.dim);
        return usable;
    }
};

// Up to BLOCK coded vectors, and which centroids each leaves open.
template <class Code>
struct Block {
    int64_t first;
    int n;
    typename Product<Code>::Packed* packed;
    float* terms;  // (4, BLOCK): scale, factors of residual and norm, rounding
    float best[BLOCK];
    float limit[BLOCK];
    int n_open[BLOCK];
    bool lost[BLOCK];
    int32_t* rows;  // (BLOCK, MOST_OPEN)
    float* upper;
};

template <class Code, class Value>
class Worker {
   public:
    Worker(const Assigning& a, const Centroids<Code>& centroids)
        : a_(a),
          c_(centroids),
          steps_(steps_of(a.dim, Product<Code>::PER_STEP)),
          chunk_rows_(static_cast<int>(std::clamp<int64_t>(CHUNK_BYTES / (c_.stride * int64_t(sizeof(Code))) / ROWS * ROWS,
                                                           ROWS, MOST_CHUNK_ROWS))),
          memory_(BLOCKS_AT_ONCE * (block_bytes() + 16 * BLOCK + BLOCK * MOST_OPEN * 8 + 256) +
                  int64_t(chunk_rows_) * BLOCK * 4 + 4 * (8 * int64_t(a.dim) + 128)) {
        if (!memory_) return;
        for (Block<Code>& block : blocks_) {
            block.packed = own_packed_[&block - blocks_] = memory_.take<typename Product<Code>::Packed>(
                block_bytes() / int64_t(sizeof(typename Product<Code>::Packed)));
            block.terms = own_terms_[&block - blocks_] = memory_.take<float>(4 * BLOCK);
            block.rows = memory_.take<int32_t>(BLOCK * MOST_OPEN);
            block.upper = memory_.take<float>(BLOCK * MOST_OPEN);
        }
        upper_ = memory_.take<float>(int64_t(chunk_rows_) * BLOCK);
        wide_ = memory_.take<double>(a.dim);
        centred_ = memory_.take<float>(a.dim);
        coded_ = memory_.take<char>(4 * int64_t(steps_) + 64);
    }

    bool is_ready() const { return static_cast<bool>(memory_); }

    // The blocks from `first` to `last`, at most BLOCKS_AT_ONCE.
    void run(int64_t first, int64_t last) {
        const int n = static_cast<int>(last - first);
        for (int b = 0; b < n; ++b) take(blocks_[b], b, first + b);
        for (int from = 0; from < a_.n_centroids; from += chunk_rows_) {
            const int to = std::min(a_.n_centroids, from + chunk_rows_);
            for (int b = 0; b < n; ++b) {
                bound(blocks_[b], from, to);
                collect(blocks_[b], from, to);
            }
        }
        for (int b = 0; b < n; ++b)
            for (int i = 0; i < blocks_[b].n; ++i) a_.labels[blocks_[b].first + i] = decide(blocks_[b], i);
    }

   private:
    int64_t block_bytes() const { return int64_t(steps_) * BLOCK * 4; }

    const Value* vector(int64_t number) const {
        return static_cast<const Value*>(a_.vectors) + number * a_.dim;
    }

    void take(Block<Code>& block, int place, int64_t number) {
        block.first = number * BLOCK;
        block.n = static_cast<int>(std::min<int64_t>(BLOCK, a_.n_vectors - block.first));
        if (a_.codes) {
            block.packed = reinterpret_cast<typename Product<Code>::Packed*>(static_cast<char*>(a_.codes) +
                                                                             number * block_bytes());
            block.terms = a_.terms + number * 4 * BLOCK;
        }
        if (!a_.is_coded) {
            if (block.n < BLOCK) {
                std::memset(block.packed, 0, block_bytes());
                std::memset(block.terms, 0, 4 * BLOCK * sizeof(float));
            }
            for (int i = 0; i < block.n; ++i) code(block, i);
        }
        std::fill(block.best, block.best + BLOCK, LOWEST);
        std::memset(block.n_open, 0, sizeof(block.n_open));
        std::memset(block.lost, 0, sizeof(block.lost));
    }

    // The same as for a centroid, in float32. Its errors are bounded as in `plane.encode`.
    void code(Block<Code>& block, int lane) {
        constexpr bool IS_INT8 = sizeof(Code) == 1;
        const Value* from = vector(block.first + lane);
        const int dim = a_.dim;
        prefetch(from, dim * int(sizeof(Value)));
        float* centred = centred_;
        const float *mean = a_.mean, shift = a_.metric == L2 ? 1.0f : 0.0f;
        float square = 0.0f, most = 0.0f;
#pragma omp simd reduction(+ : square) reduction(max : most)
        for (int i = 0; i < dim; ++i) {
            const float value = static_cast<float>(wide(from[i])) - shift * mean[i];
            centred[i] = value;
            square += value * value;
            most = std::fabs(value) > most ? std::fabs(value) : most;
        }
        // NaN anywhere is in the sum, and is not below.
        const bool unusable = !(square < HIGHEST && most < a_.largest);
        if (unusable) {
            std::fill(centred, centred + dim, 0.0f);
            square = most = 0.0f;
        }
        const float scale = IS_INT8 ? std::max(most / 127.0f, static_cast<float>(SMALLEST_SCALE)) : 1.0f;
        float left = 0.0f;
        if (IS_INT8) {
            const float inverse = 1.0f / scale;
            uint8_t* coded = reinterpret_cast<uint8_t*>(coded_);
#pragma omp simd reduction(+ : left)
            for (int i = 0; i < dim; ++i) {
                const float code = std::rint(centred[i] * inverse);  // 127 at most
                const float rest = centred[i] - code * scale;
                left += rest * rest;
                coded[i] = static_cast<uint8_t>(static_cast<int>(code) + 128);
            }
            for (int i = dim; i < 4 * steps_; ++i) coded[i] = 0;
        } else {
            std::memcpy(coded_, centred, dim * sizeof(float));
        }
        char* to = reinterpret_cast<char*>(block.packed) + 4 * lane;
        for (int i = 0; i < steps_; ++i) std::memcpy(to + int64_t(i) * BLOCK * 4, coded_ + 4 * i, 4);

        const double slack = 1.0 + (dim + 8) * UNIT, tiny = std::sqrt(double(dim)) / (1ull << 63);
        const double norm = std::sqrt(double(square)) * slack + tiny;
        const double residual = std::sqrt(double(left)) * slack + norm * (4.0 * UNIT) + tiny;
        const double length = norm + residual, lost = a_.rounded * UNIT, widen = 1.0 + 9.0 * UNIT;
        float* terms = block.terms + lane;
        terms[0] = scale;
        terms[BLOCK] = static_cast<float>((1.0 + lost) * length * widen + LEAST_FACTOR);
        terms[2 * BLOCK] = static_cast<float>((residual + lost * length) * widen + LEAST_FACTOR);
        const double rounding = a_.metric == L2 ? norm * norm : norm * c_.mean_length;
        terms[3 * BLOCK] = unusable ? HIGHEST : static_cast<float>(rounding * widen);
    }

    // Upper bounds of the similarities with some centroids, and the largest lower bounds.
    void bound(Block<Code>& block, int from, int to) {
        for (int first = from; first < to; first += ROWS) {
            const Code* rows[ROWS];
            int corrections[ROWS];
            const int n = std::min(ROWS, to - first);
            for (int r = 0; r < ROWS; ++r) {
                const int row = first + std::min(r, n - 1);
                rows[r] = c_.codes + row * c_.stride;
                corrections[r] = c_.correction[row];
            }
            typename Product<Code>::Sums sums[ROWS][VECTORS];
            multiply<Code, ROWS, VECTORS>(rows, corrections, nullptr, block.packed, a_.dim, sums);
#pragma GCC unroll 16
            for (int v = 0; v < VECTORS; ++v) {
                const Floats scale = load(block.terms + v * LANES);
                const Floats residual = load(block.terms + BLOCK + v * LANES);
                const Floats norm = load(block.terms + 2 * BLOCK + v * LANES);
                Floats best = load(block.best + v * LANES);
#pragma GCC unroll 16
                for (int r = 0; r < ROWS; ++r) {
                    const int row = first + std::min(r, n - 1);
                    Floats error = times_plus(norm, all(c_.norm[row]), all(c_.rest[row]));
                    error = times_plus(residual, all(c_.residual[row]), error);
                    Floats similarity = times(Product<Code>::floats(sums[r][v]), scale);
                    similarity = times_plus(similarity, all(c_.scale[row]), all(c_.bias[row]));
                    store(upper_ + int64_t(row - from) * BLOCK + v * LANES, similarity + error);
                    best = larger(similarity - error, best);
                }
                store(block.best + v * LANES, best);
            }
        }
    }

    // Note the centroids whose upper bound reaches the largest lower bound so far.
    void collect(Block<Code>& block, int from, int to) {
        const float* rounding = block.terms + 3 * BLOCK;
        for (int i = 0; i < BLOCK; ++i)
            block.limit[i] =
                i < block.n && rounding[i] < HIGHEST ? threshold(block.best[i], rounding[i]) : HIGHEST;
        Floats limit[VECTORS];
        for (int v = 0; v < VECTORS; ++v) limit[v] = load(block.limit + v * LANES);
        for (int row = from; row < to; ++row) {
            const float* upper = upper_ + int64_t(row - from) * BLOCK;
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v)
                for (unsigned bits = not_below(load(upper + v * LANES), limit[v]); bits; bits &= bits - 1) {
                    const int i = v * LANES + __builtin_ctz(bits);
                    keep(block, i, row, upper[i]);
                }
        }
    }

    void keep(Block<Code>& block, int i, int row, float upper) {
        if (block.n_open[i] == MOST_OPEN) {
            drop(block, i, block.limit[i]);
            if (block.n_open[i] == MOST_OPEN) {
                block.lost[i] = true;
                return;
            }
        }
        const int place = i * MOST_OPEN + block.n_open[i]++;
        block.rows[place] = row;
        block.upper[place] = upper;
    }

    void drop(Block<Code>& block, int i, float limit) {
        int32_t* rows = block.rows + i * MOST_OPEN;
        float* upper = block.upper + i * MOST_OPEN;
        int kept = 0;
        for (int j = 0; j < block.n_open[i]; ++j) {
            if (upper[j] < limit) continue;
            rows[kept] = rows[j];
            upper[kept++] = upper[j];
        }
        block.n_open[i] = kept;
    }

    // The nearest centroid by the definition; -1 where that takes more than is done here.
    int64_t decide(Block<Code>& block, int i) {
        if (block.lost[i] || !(block.terms[3 * BLOCK + i] < HIGHEST)) return -1;
        if (block.n_open[i] > 1) drop(block, i, block.limit[i]);
        const int32_t* rows = block.rows + i * MOST_OPEN;
        const float* upper = block.upper + i * MOST_OPEN;
        if (block.n_open[i] == 1) return rows[0];
        const Value* from = vector(block.first + i);
        double square = 0.0, product = 0.0;
        const double shift = a_.metric == L2 ? 1.0 : 0.0;
        double* whole = wide_;
        const float* mean = a_.mean;
#pragma omp simd reduction(+ : square, product)
        for (int j = 0; j < a_.dim; ++j) {
            const double value = wide(from[j]), rest = value - shift * mean[j];
            whole[j] = value;
            square += rest * rest;
            product += value * mean[j];
        }
        const double length = std::sqrt(square);
        const int first = static_cast<int>(std::max_element(upper, upper + block.n_open[i]) - upper);
        const double sign = a_.metric == L2 ? 1.0 : -1.0;
        Score nearest = score(a_.metric, wide_, length, a_.centroids + int64_t(rows[first]) * a_.dim, a_.dim);
        bool sure = nearest.sure, alone = true;
        int64_t label = rows[first];
        const double value = nearest.value;
        const double similarity = a_.metric == L2   ? 0.5 * (square - value)
                                  : a_.metric == IP ? value - product
                                                    : value * length - product;
        const float limit = threshold(similarity, block.terms[3 * BLOCK + i]);
        for (int j = 0; j < block.n_open[i]; ++j) {
            if (j == first || upper[j] < limit) continue;
            const Score other =
                score(a_.metric, wide_, length, a_.centroids + int64_t(rows[j]) * a_.dim, a_.dim);
            alone = false;
            sure &= other.sure;
            const double difference = sign * (double(other.value) - nearest.value);
            if (difference < 0.0 || (difference == 0.0 && rows[j] < label)) {
                nearest = other;
                label = rows[j];
            }
        }
        return sure || alone ? label : -1;
    }

    const Assigning& a_;
    const Centroids<Code>& c_;
    const int steps_;
    const int chunk_rows_;
    Memory memory_;
    Block<Code> blocks_[BLOCKS_AT_ONCE];
    typename Product<Code>::Packed* own_packed_[BLOCKS_AT_ONCE];
    float* own_terms_[BLOCKS_AT_ONCE];
    float* upper_;
    double* wide_;
    float* centred_;
    char* coded_;
};

template <class Code, class Value>
Outcome run(const Assigning& a) {
    Centroids<Code> centroids(a);
    if (!centroids.memory) return NO_MEMORY;
    const int64_t blocks = (a.n_vectors + BLOCK - 1) / BLOCK;
    std::atomic<bool> ready{true}, usable{true};
    Pieces numbers(a.n_centroids, a.n_centroids / (4 * a.n_threads)), pieces(blocks, BLOCKS_AT_ONCE);
    Team::run(a.n_threads, [&](int) {
        for (int64_t number, last; numbers.take(number, last);)
            for (; number < last; ++number)
                if (!centroids.fill(a, number)) usable = false;
    });
    if (!usable) return UNBOUNDED;
    Team::run(a.n_threads, [&](int) {
        if (!pieces.are_left()) return;
        Worker<Code, Value> worker(a, centroids);
        if (!worker.is_ready()) {
            ready = false;
            return;
        }
        for (int64_t first, last; pieces.take(first, last);) worker.run(first, last);
    });
    return ready ? DONE : NO_MEMORY;
}

template <class Code>
Outcome run(const Assigning& a) {
    switch (a.vector_type) {
        case 0: return run<Code, float>(a);
        case 1: return run<Code, Half>(a);
        case 2: return run<Code, BFloat>(a);
        default: return UNKNOWN_TYPE;
    }
}

}  // namespace assigning
