// The rows that a scan meets, a chunk at a time: their codes and the terms of their bounds.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "arguments.h"
#include "grid.h"
#include "memory.h"
#include "products.h"
#include "reservoir.h"

// Rows at a time: for many queries as many as stay in cache, for few long stretches of memory.
constexpr int64_t CHUNK_BYTES = 96 * 1024, LONG_CHUNK_BYTES = 768 * 1024;
constexpr int64_t DECODED_CHUNK_BYTES = 32 * 1024, GRID_CHUNK_BYTES = 160 * 1024;
constexpr int64_t MOST_CHUNK_ROWS = 12 * 1024;
constexpr int FEW_QUERIES = 4;

// One array a term.
template <class Code>
struct Chunk {
    int64_t first;         // the place of the first codes; those of the others follow
    const int64_t* slots;  // rows, from the chunk's first on; null where these are the places
    bool scattered;        // the rows are the places, which do not follow each other
    int n;
    float* scale;
    float* residual;
    float* norm;
    float* bias;  // with what every bound of the row contains
    float* rest;  // by how much float32 may err in a bound, beside what residual and norm say
    int* correction;
    const Code* unpacked;  // (n, D), or null
    const typename Product<Code>::Row* features;  // (n, D), where many queries do not meet the codes themselves

    int64_t row(int r) const { return slots ? slots[r] : first + r; }
    int64_t place(int r) const { return scattered ? slots[r] : first + r; }
};

template <class Code>
class Rows {
   public:
    // Scalars on a grid are searched as they are stored.
    static constexpr bool UNPACKS = !std::is_same_v<Code, uint8_t>;
    using Row = typename Product<Code>::Row;
    static constexpr bool CONVERTS = !std::is_same_v<Code, Row>;
    static constexpr int MOST_TILE = 12;       // rows of a tile, at most
    static constexpr int64_t TILE_STEP = 48;  // a multiple of every tile's rows

    explicit Rows(const Arguments& a) : a_(a) {
        const bool decodes = UNPACKS && unpacks(a), on_grid = decodes && a.grid.steps;
        const int64_t bytes = on_grid                      ? GRID_CHUNK_BYTES
                              : decodes                    ? DECODED_CHUNK_BYTES
                              : a.n_queries <= FEW_QUERIES ? LONG_CHUNK_BYTES
                                                           : CHUNK_BYTES;
        // On a grid a multiple of 64 rows, which are looked up together.
        const int64_t step = on_grid ? 4 * TILE_STEP : TILE_STEP;
        most_ = std::clamp<int64_t>(bytes / (a.dim * int64_t(sizeof(Code))) / step * step, step, MOST_CHUNK_ROWS);
    }

    // Rows of a chunk, at most.
    int64_t most() const { return most_; }

    bool prepare() {
        terms_ = allocate<float>(5 * most_);
        corrections_ = allocate<int>(most_ + MOST_TILE);
        if (UNPACKS && unpacks(a_)) unpacked_ = allocate<Code>(most_ * a_.dim + 64);
        const bool converts = CONVERTS && a_.n_queries > Product<Code>::MOST_ONE_BY_ONE;
        if (converts) features_ = allocate<Row>(most_ * a_.dim);
        return terms_ && corrections_ && (unpacked_ || !UNPACKS || !unpacks(a_)) && (features_ || !converts);
    }

    // Take n rows, at most so many as a chunk has; with what products of many queries need, and with the codes
    // that products need, if asked.
    Chunk<Code> take(int64_t first, const int64_t* slots, int n, bool with_corrections, bool with_codes = true) {
        Chunk<Code> c;
        c.first = first;
        c.slots = slots;
        c.scattered = slots && (!UNPACKS || !a_.codes_in_slots);
        c.n = n;
        c.scale = terms_.get();
        c.residual = c.scale + most_;
        c.norm = c.residual + most_;
        c.bias = c.norm + most_;
        c.rest = c.bias + most_;
        c.correction = corrections_.get();
        c.unpacked = nullptr;
        c.features = features_.get();
        if (!UNPACKS || !with_codes) {
            prefetch_packed(c, 0, UNPACKS ? first_rows() : AHEAD);
            take_grid_terms(c);
        } else if (unpacks(a_)) {
            unpack_rows(c);
        } else if (c.scattered) {
            // Rows of a list lie anywhere.
            for (int r = 0; r < n; ++r) _mm_prefetch(reinterpret_cast<const char*>(a_.terms + 4 * slots[r]), _MM_HINT_T0);
            for (int r = 0; r < std::min(n, AHEAD); ++r) fetch(codes_in(slots[r]), row_bytes());
            take_terms(c, [&](int r) { return a_.terms + 4 * slots[r]; });
        } else {
            take_terms(c, [&](int r) { return a_.terms + 4 * (first + r); });
        }
        if constexpr (UNPACKS && Product<Code>::TILES) {
            for (int r = 0; with_codes && with_corrections && r < n; ++r) {
                prefetch_ahead(c, r);
                if constexpr (CONVERTS)
                    convert(codes_of(c, r), a_.dim, features_.get() + int64_t(r) * a_.dim);
                c.correction[r] = Product<Code>::correction(codes_of(c, r), a_.dim);
            }
        }
        return c;
    }

    const Code* codes_of(const Chunk<Code>& c, int r) const {
        if (!UNPACKS) return reinterpret_cast<const Code*>(packed(c, r));
        return c.unpacked ? c.unpacked + int64_t(r) * a_.dim : codes_in(c.place(r));
    }

    // What many queries meet of a row of a chunk that was taken for them.
    const Row* features_of(const Chunk<Code>& c, int r) const {
        if constexpr (CONVERTS)
            return c.features + int64_t(r) * a_.dim;
        else
            return codes_of(c, r);
    }

    // The codes behind which there are no others.
    const Code* last() const { return codes_in((UNPACKS && a_.codes_in_slots ? a_.n_slots : a_.n_rows) - 1); }

    // Where the codes of a row of parts begin.
    const uint8_t* packed(const Chunk<Code>& c, int r) const { return packed(c.first + r, c.row(r)); }

    // Ask for the codes of n rows of a chunk, as far as there are so many.
    void prefetch_packed(const Chunk<Code>& c, int first, int n) const {
        for (int r = first; r < std::min(first + n, c.n); ++r) prefetch_packed(c, r);
    }

    // Make ready for rows of a list: ask for the first ones, wherever they lie.
    void take_list(int64_t number) {
        if (!unpacks(a_)) return;
        list_ = number;
        // Nobody has looked at the rows in its slots yet, whose places would have to be read.
        if (a_.packed.places && !a_.packed.slot_places) return;
        const int64_t start = a_.list_starts[number];
        const int64_t end = std::min(start + std::min<int64_t>(a_.list_sizes[number], first_rows()), a_.n_slots);
        for (int64_t slot = std::max<int64_t>(start, 0); slot < end; ++slot) fetch(packed(slot, a_.slots[slot]), a_.packed.code_size);
    }

    // Ask for the rows that follow n rows of a chunk soon.
    void prefetch_ahead(const Chunk<Code>& c, int r, int n = 1) const {
        if (!c.scattered || c.unpacked || together(c)) return;
        for (int i = r + AHEAD; i < std::min(r + AHEAD + n, c.n); ++i) fetch(codes_of(c, i), row_bytes());
    }

   private:
    static constexpr int AHEAD = 8, DECODED_AHEAD = 24, FIRST_BYTES = 8192, MOST_FIRST_ROWS = 64;

    // Rows of a list or chunk that are asked for before the first one is needed.
    int first_rows() const { return std::clamp(FIRST_BYTES / a_.packed.code_size, AHEAD, MOST_FIRST_ROWS); }

    // Every line of memory that holds some of these bytes.
    static void fetch(const void* place, int64_t bytes) {
        const char* first = static_cast<const char*>(place);
        for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(first + i, _MM_HINT_T0);
        _mm_prefetch(first + bytes - 1, _MM_HINT_T0);
    }

    // Whether the codes of a chunk follow each other, as far as its ends tell: then products ask for what comes.
    bool together(const Chunk<Code>& c) const {
        const int32_t* places = UNPACKS ? nullptr : a_.packed.slot_places;
        return places && c.slots && places[c.first + c.n - 1] - places[c.first] == c.n - 1;
    }

    int64_t row_bytes() const { return a_.dim * int64_t(sizeof(Code)); }

    // What lies in a place of the codes that are searched.
    const Code* codes_in(int64_t place) const {
        return static_cast<const Code*>(UNPACKS ? a_.codes : a_.packed.codes) + place * a_.dim;
    }

    // Where the codes begin of the row in a slot, or of a row.
    const uint8_t* packed(int64_t slot, int64_t row) const {
        return a_.packed.slot_places ? codes_at(a_.packed, a_.packed.slot_places[slot]) : ::codes_of(a_.packed, row);
    }

    void prefetch_packed(const Chunk<Code>& c, int r) const { fetch(packed(c, r), a_.packed.code_size); }

    template <class Place>
    void take_terms(Chunk<Code>& c, Place terms_of) {
        const float slack = a_.slack;
        float *scale = c.scale, *residual = c.residual, *norm = c.norm, *bias = c.bias, *rest = c.rest;
#pragma omp simd
        for (int r = 0; r < c.n; ++r) {
            const float* terms = terms_of(r);
            scale[r] = terms[0];
            residual[r] = terms[1];
            norm[r] = terms[2];
            // Without slack an infinite norm would make this NaN.
            rest[r] = slack == 0.0f ? 0.0f : terms[2] * terms[2] * slack;
            bias[r] = terms[3] + (rest[r] + FLOOR);
        }
    }

    void unpack_rows(Chunk<Code>& c) {
        prefetch_packed(c, 0, DECODED_AHEAD);
        c.unpacked = unpacked_.get();
        if constexpr (std::is_same_v<Code, int8_t>) {
            take_codes(c);
            take_grid_terms(c);
        } else if constexpr (std::is_same_v<Code, float>) {
            decode_rows(c);
        }
    }

    // The rows' codes on a grid.
    void take_codes(Chunk<Code>& c) {
        const int last = c.n - 1;
        auto place = [&](int r) {
            prefetch_packed(c, std::min(r + AHEAD, last));
            return packed(c, r);
        };
        code_rows(a_.grid, a_.packed, a_.dim, c.n, place, unpacked_.get());
    }

    void take_grid_terms(Chunk<Code>& c) {
        const float* terms = a_.grid.terms + 2 * c.first;
        float *scale = c.scale, *residual = c.residual, *norm = c.norm, *bias = c.bias, *rest = c.rest;
        const float every = a_.grid.residual;
#pragma omp simd
        for (int r = 0; r < c.n; ++r) {
            scale[r] = 1.0f;
            residual[r] = every;
            norm[r] = terms[2 * r];
            rest[r] = 8.0f * float(UNIT) * std::fabs(terms[2 * r + 1]);
            bias[r] = terms[2 * r + 1] + (rest[r] + FLOOR);
        }
    }

    // The rows' vectors and the terms of their bounds, as `plane.plain_plane` makes them.
    void decode_rows(Chunk<Code>& c) {
        float* squares = c.bias;
        const bool same = list_ >= 0 || !a_.packed.centroids;
        if (same && a_.packed.packing == HALVES)
            decode_short_floats<HALVES>(c, squares);
        else if (same && a_.packed.packing == BFLOATS)
            decode_short_floats<BFLOATS>(c, squares);
        else
            decode_any(c, squares);
        if (a_.metric == COSINE)
            take_unit_terms(c, squares);
        else
            take_plain_terms(c, squares);
    }

    void decode_any(Chunk<Code>& c, float* squares) {
        for (int r = 0; r < c.n; ++r) {
            if (r + DECODED_AHEAD < c.n) prefetch_packed(c, r + DECODED_AHEAD);
            Code* vector = unpacked_.get() + int64_t(r) * a_.dim;
            const int64_t row = c.row(r);
            const int64_t list = list_ >= 0 || !a_.packed.centroids ? list_ : a_.packed.assignments[row];
            unpack(a_.packed, packed(c, r), a_.dim, centroid_of(a_.packed, list, a_.dim), vector);
            squares[r] = square_in_floats(vector, a_.dim);
        }
    }

    static float square_in_floats(const float* vector, int dim) {
        Floats sums[2] = {all(0.0f), all(0.0f)};
        int i = 0;
        for (; i + 2 * LANES <= dim; i += 2 * LANES)
            for (int part = 0; part < 2; ++part) {
                const Floats x = load(vector + i + part * LANES);
                sums[part] = times_plus(x, x, sums[part]);
            }
        for (; i < dim; i += LANES) {
            const Floats x = load_first(vector + i, dim - i < LANES ? dim - i : LANES);
            sums[0] = times_plus(x, x, sums[0]);
        }
        return sum(plus(sums[0], sums[1]));
    }

    template <int32_t PACKING>
    void decode_short_floats(Chunk<Code>& c, float* squares) {
        const float* centroid = centroid_of(a_.packed, std::max<int64_t>(list_, 0), a_.dim);
        for (int first = 0; first < c.n; first += FEW) {
            prefetch_packed(c, first + DECODED_AHEAD, FEW);
            const uint8_t* codes[FEW];
            float* out[FEW];
            for (int i = 0; i < FEW; ++i) {
                const int r = std::min(first + i, c.n - 1);
                codes[i] = packed(c, r);
                out[i] = unpacked_.get() + int64_t(r) * a_.dim;
            }
            unpack_four<PACKING>(codes, a_.dim, centroid, out, squares + first);
        }
    }

    // A square in float32 errs by this part of itself, and by what lies below the normal numbers.
    float square_slack() const { return static_cast<float>((a_.dim + 8) * UNIT); }

    void take_plain_terms(Chunk<Code>& c, const float* squares) {
        const float slack = square_slack(), lost = static_cast<float>(std::sqrt(double(a_.dim)) / (1ull << 63));
        const float of_bias = a_.metric == L2 ? -0.5f : 0.0f;
        const float every = a_.metric == L2 ? a_.slack + 0.5f * (slack + 4.0f * float(UNIT)) : 0.0f;
        float *scale = c.scale, *residual = c.residual, *norm = c.norm, *bias = c.bias, *rest = c.rest;
#pragma omp simd
        for (int r = 0; r < c.n; ++r) {
            const float square = squares[r], length = std::sqrt(square);
            const bool known = length < float(1ull << 60);
            scale[r] = 1.0f;
            residual[r] = 0.0f;
            norm[r] = known ? length * (1.0f + slack) + lost : HIGHEST;
            rest[r] = known ? norm[r] * norm[r] * every : 0.0f;
            bias[r] = (known ? of_bias * square : 0.0f) + (rest[r] + FLOOR);
        }
    }

    void take_unit_terms(Chunk<Code>& c, const float* squares) {
        const float slack = 2.0f * square_slack();
        for (int r = 0; r < c.n; ++r) {
            double square = squares[r];
            // Too short for float32.
            if (square < 1.0 / (1ull << 60)) square = square_of(c.unpacked + int64_t(r) * a_.dim, a_.dim);
            const double length = std::sqrt(square);
            const bool bounded = length < double(1ull << 60) && (length > 1.0 / (1ull << 50) || square == 0.0);
            c.scale[r] = length > 0.0 ? static_cast<float>(1.0 / length) : 1.0f;
            c.residual[r] = slack;
            c.norm[r] = bounded ? 1.0f + slack : HIGHEST;
            c.rest[r] = 0.0f;
            c.bias[r] = FLOOR;
        }
    }

    const Arguments& a_;
    int64_t most_;
    int64_t list_ = -1;  // that all rows are of; -1 where they may be of any
    Memory<float> terms_;
    Memory<int> corrections_;
    Memory<Code> unpacked_;
    Memory<Row> features_;
};
