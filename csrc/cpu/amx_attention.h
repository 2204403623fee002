// Attention of many queries over shared bfloat16 keys by AMX. Scores and sums are computed transposed, keys and head
// dimensions down, query rows across, so that the pool's keys are a left operand as they lie and the softmax runs down
// whole vectors of rows:
//
//   S^T = K Q^T [keys, rows],   P^T = exp(scale S^T - highest),   O^T = V^T P^T [head size, rows]
//
// A score is rounded once, as a weight of the sum (a bfloat16 left operand is all that AMX takes); scores, maxima and
// totals are float32. The thread's tiles are set up by the caller.
//
// Of few rows (a branch's own tail, a sequence that shares nothing) a vector holds several keys of all rows, and the
// values are multiplied as they lie, by `vdpbf16ps`: whole tiles of 16 rows would be empty for the most part, and
// turning the values round costs more than multiplying them. Of one or two rows, so are the keys. What takes the time
// is the memory: rows of the pool are asked for ahead, a few with each product.
#pragma once

#include "cpu/amx.h"

#if defined(__x86_64__) && defined(__linux__)

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <utility>

#include "cpu/kernels.h"

namespace gpo_fast::cpu::amx {

constexpr int64_t kKeyBlock = 32;  // keys that a product takes together: two tiles of scores, one of pairs of keys

// Scratch memory of a thread, in whole cache lines, which grows as it must.
class Scratch {
  public:
    void* take(std::size_t bytes) {
        if (bytes > size_) {
            memory_.reset(std::aligned_alloc(64, bytes));
            if (!memory_) throw std::bad_alloc();
            size_ = bytes;
        }
        return memory_.get();
    }

  private:
    struct Free {
        void operator()(void* memory) const { std::free(memory); }
    };
    std::unique_ptr<void, Free> memory_;
    std::size_t size_ = 0;
};

// The arrays of one piece; rows and keys are rounded up to whole tiles, as is the head size.
struct PieceArrays {
    int64_t rows, keys, dim;
    pair* queries;    // [dim / 2, rows]
    bf16* key_block;  // [kKeyBlock, dim]
    float* scores;    // [keys, rows]
    pair* weights;    // [keys / 2, rows]
    bf16* values;     // [dim, keys]: the values as columns
    float* sums;      // [dim, rows]
    int64_t* places;  // [keys]: see find_keys

    PieceArrays(const AttentionPiece& piece, Scratch& scratch)
        : rows(static_cast<int64_t>(round_up(piece.rows, 16))),
          keys(static_cast<int64_t>(round_up(piece.count, kKeyBlock))),
          dim(static_cast<int64_t>(round_up(piece.dim, 32))) {
        char* at = static_cast<char*>(scratch.take(2 * dim * rows + 2 * kKeyBlock * dim + 4 * keys * rows +
                                                   2 * keys * rows + 2 * dim * keys + 4 * dim * rows + 8 * keys));
        const auto next = [&at](std::size_t bytes) { return std::exchange(at, at + bytes); };
        queries = reinterpret_cast<pair*>(next(2 * dim * rows));
        key_block = reinterpret_cast<bf16*>(next(2 * kKeyBlock * dim));
        scores = reinterpret_cast<float*>(next(4 * keys * rows));
        weights = reinterpret_cast<pair*>(next(2 * keys * rows));
        values = reinterpret_cast<bf16*>(next(2 * dim * keys));
        sums = reinterpret_cast<float*>(next(4 * dim * rows));
        places = reinterpret_cast<int64_t*>(next(8 * keys));
    }
};

GPO_AMX inline __mmask16 first_lanes(int64_t count) {
    return count >= 16 ? 0xffff : static_cast<__mmask16>(count <= 0 ? 0 : (1u << count) - 1);
}

// Where the piece's keys and values begin, in elements of the pool.
inline void find_keys(const AttentionPiece& piece, int64_t* places) {
    const int32_t* page = piece.pages + piece.first / piece.block_size;
    for (int64_t t = 0, within = piece.first % piece.block_size; t < piece.count; ++t) {
        places[t] = (static_cast<int64_t>(*page) * piece.block_size + within) * piece.slot_stride;
        if (++within == piece.block_size) within = 0, ++page;
    }
}

// The pool is read in short stretches, which the hardware does not foresee.
GPO_AMX inline void prefetch_row(const bf16* row, int64_t dim) {
    for (int64_t d = 0; d < dim; d += 32) _mm_prefetch(reinterpret_cast<const char*>(row + d), _MM_HINT_T0);
    __asm__ volatile("");  // else gcc drops calls that it does not inline: a prefetch is no effect to it
}

GPO_AMX inline __mmask32 first_halves(int64_t count) {
    return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
}

// A key, and zeros up to `padded`, a multiple of 32.
GPO_AMX inline void copy_row(const bf16* from, int64_t dim, int64_t padded, bf16* to) {
    for (int64_t d = 0; d < padded; d += 32)
        _mm512_store_si512(to + d, _mm512_maskz_loadu_epi16(first_halves(dim - d), from + d));
}

// The queries as a right operand: pairs of head dimensions down, rows across.
GPO_AMX inline void pack_queries(const AttentionPiece& piece, PieceArrays& arrays) {
    for (int64_t r = 0; r < arrays.rows; r += 16) {
        for (int64_t d = 0; d < arrays.dim; d += 32) {
            __m512i block[16];
            for (int64_t i = 0; i < 16; ++i) {
                const float* from = piece.query + (r + i) * piece.padded + d;
                const __mmask16 there = r + i < piece.rows ? 0xffff : 0;
                const __mmask16 low = there & first_lanes(piece.padded - d);
                const __mmask16 high = there & first_lanes(piece.padded - d - 16);
                block[i] = (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(high, from + 16),
                                                        _mm512_maskz_loadu_ps(low, from));
            }
            transpose_16x16(block);
            for (int64_t i = 0; i < 16; ++i)
                _mm512_store_si512(arrays.queries + (d / 2 + i) * arrays.rows + r, block[i]);
        }
    }
}

// c [32, 32 or 16] = a [32, 32 steps] b, pairs of the depth together in b.
GPO_AMX inline void multiply_block(const bf16* a, int64_t lda, const pair* b, int64_t ldb, int64_t steps, bool wide,
                                   float* c, int64_t ldc) {
    finish_stores();
    zero_sums();
    for (int64_t step = 0; step < steps; ++step) {
        const bf16* left = a + step * 32;
        const pair* right = b + step * 16 * ldb;
        _tile_loadd(4, left, lda * 2);
        _tile_loadd(5, left + 16 * lda, lda * 2);
        _tile_loadd(6, right, ldb * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (!wide) continue;
        _tile_loadd(7, right + 16, ldb * 4);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, ldc * 4);
    _tile_stored(1, c + 16 * ldc, ldc * 4);
    if (wide) {
        _tile_stored(2, c + 16, ldc * 4);
        _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
    }
    finish_stores();
}

GPO_AMX inline void multiply_blocks(const bf16* a, int64_t lda, const pair* b, int64_t rows, int64_t steps, float* c) {
    for (int64_t r = 0; r < rows; r += 32) multiply_block(a, lda, b + r, rows, steps, r + 16 < rows, c + r, rows);
}

// S^T. A key beyond the piece's is left as it was: no row sees it.
GPO_AMX inline void score_keys(const AttentionPiece& piece, PieceArrays& arrays) {
    for (int64_t start = 0; start < arrays.keys; start += kKeyBlock) {
        for (int64_t i = 0; i < kKeyBlock && start + i < piece.count; ++i) {
            const bf16* from = static_cast<const bf16*>(piece.keys) + arrays.places[start + i];
            prefetch_row(static_cast<const bf16*>(piece.values) + arrays.places[start + i], piece.dim);
            if (start + i + kKeyBlock < piece.count) {
                prefetch_row(static_cast<const bf16*>(piece.keys) + arrays.places[start + i + kKeyBlock], piece.dim);
            }
            copy_row(from, piece.dim, arrays.dim, arrays.key_block + i * arrays.dim);
        }
        multiply_blocks(arrays.key_block, arrays.dim, arrays.queries, arrays.rows, arrays.dim / 32,
                        arrays.scores + start * arrays.rows);
    }
}

inline void cap_scores(const AttentionPiece& piece, int64_t count, float* scores) {
    for (int64_t i = 0; i < count; ++i) scores[i] = piece.softcap * std::tanh(scores[i] * piece.scale / piece.softcap);
}

// P^T of 16 rows from `r` on, with their maxima and totals.
GPO_AMX inline void weigh(const AttentionPiece& piece, PieceArrays& arrays, int64_t r) {
    const __mmask16 there = first_lanes(piece.rows - r);
    const __m512i seen =
        _mm512_sub_epi32(_mm512_maskz_loadu_epi32(there, piece.visible + r), _mm512_set1_epi32(piece.first));
    const __m512 scale = _mm512_set1_ps(piece.softcap > 0 ? 1.0f : piece.scale);
    const __m512 nothing = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    const float* scores = arrays.scores + r;
    __m512 highest = nothing;
    for (int64_t t = 0; t < piece.count; ++t) {
        const __mmask16 sees = _mm512_cmpgt_epi32_mask(seen, _mm512_set1_epi32(static_cast<int>(t)));
        highest = _mm512_mask_max_ps(highest, sees, highest, _mm512_load_ps(scores + t * arrays.rows));
    }
    highest = _mm512_mul_ps(highest, scale);
    alignas(64) static const std::uint16_t kTogether[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                            21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                            11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i together = _mm512_load_si512(kTogether);
    const __m512i shown = _mm512_min_epi32(seen, _mm512_set1_epi32(piece.count));
    __m512 total = _mm512_setzero_ps();
    for (int64_t t = 0; t < arrays.keys; t += 2) {
        __m512 weight[2];
        for (int64_t i = 0; i < 2; ++i) {
            const __mmask16 sees = _mm512_cmpgt_epi32_mask(shown, _mm512_set1_epi32(static_cast<int>(t + i)));
            const __m512 score = _mm512_load_ps(scores + (t + i) * arrays.rows);
            weight[i] = _mm512_maskz_mov_ps(sees, exp_ps(_mm512_fmsub_ps(score, scale, highest)));
            total = _mm512_add_ps(total, weight[i]);
        }
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(weight[1], weight[0]);
        _mm512_store_si512(arrays.weights + t / 2 * arrays.rows + r, _mm512_permutexvar_epi16(together, both));
    }
    _mm512_mask_storeu_ps(piece.highest + r, there, highest);
    _mm512_mask_storeu_ps(piece.total + r, there, total);
}

// The values as columns; zeros beyond the piece's keys, whose weights are zero, and beyond the head size.
GPO_AMX inline void transpose_values(const AttentionPiece& piece, PieceArrays& arrays) {
    for (int64_t start = 0; start < arrays.keys; start += kKeyBlock) {
        const bf16* rows[kKeyBlock];
        for (int64_t i = 0; i < kKeyBlock; ++i)
            rows[i] =
                start + i < piece.count ? static_cast<const bf16*>(piece.values) + arrays.places[start + i] : nullptr;
        for (int64_t d = 0; d < arrays.dim; d += 16) {
            const __mmask16 inside = first_lanes(piece.dim - d);
            const auto wide = [&](int64_t i) GPO_AMX {
                if (!rows[i]) return _mm512_setzero_si512();
                return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, rows[i] + d));
            };
            __m512i block[16];
            for (int64_t i = 0; i < 16; ++i)
                block[i] = _mm512_or_si512(wide(2 * i), _mm512_slli_epi32(wide(2 * i + 1), 16));
            transpose_16x16(block);
            for (int64_t i = 0; i < 16; ++i)
                _mm512_store_si512(arrays.values + (d + i) * arrays.keys + start, block[i]);
        }
    }
}

// O^T into the piece's sums [rows, padded].
GPO_AMX inline void store_sums(const AttentionPiece& piece, const PieceArrays& arrays) {
    for (int64_t r = 0; r < arrays.rows; r += 16) {
        for (int64_t d = 0; d < piece.padded; d += 16) {
            __m512i block[16];
            for (int64_t i = 0; i < 16; ++i) block[i] = _mm512_load_si512(arrays.sums + (d + i) * arrays.rows + r);
            transpose_16x16(block);
            for (int64_t i = 0; i < 16 && r + i < piece.rows; ++i)
                _mm512_storeu_si512(piece.sum + (r + i) * piece.padded + d, block[i]);
        }
    }
}

constexpr int64_t kBytesAhead = 8192;  // of keys or values, between what is read and what is asked for

// The arrays of a piece of up to `Rows` rows: 2, 4 or 8.
template <int64_t Rows>
struct FewArrays {
    int64_t keys, dim;
    int64_t ahead;    // rows, see prefetch_ahead
    pair* queries;    // [dim / 2, Rows], or of 2 rows [Rows, dim / 2]
    bf16* key_block;  // [kKeyBlock, dim]
    float* scores;    // [keys, Rows]
    pair* weights;    // [keys / 2, Rows]
    int64_t* places;  // [keys]: see find_keys; beyond the piece's, the last of them

    FewArrays(const AttentionPiece& piece, Scratch& scratch)
        : keys(static_cast<int64_t>(round_up(piece.count, kKeyBlock))),
          dim(static_cast<int64_t>(round_up(piece.dim, 32))),
          ahead(std::min<int64_t>(piece.count, kBytesAhead / (2 * dim))) {
        char* at = static_cast<char*>(
            scratch.take(2 * dim * Rows + 2 * kKeyBlock * dim + 4 * keys * Rows + 2 * keys * Rows + 8 * keys));
        const auto next = [&at](std::size_t bytes) { return std::exchange(at, at + bytes); };
        queries = reinterpret_cast<pair*>(next(2 * dim * Rows));
        key_block = reinterpret_cast<bf16*>(next(2 * kKeyBlock * dim));
        scores = reinterpret_cast<float*>(next(4 * keys * Rows));
        weights = reinterpret_cast<pair*>(next(2 * keys * Rows));
        places = reinterpret_cast<int64_t*>(next(8 * keys));
    }
};

// At row `i` of the keys or values that the thread reads now, asks for the row that it reads `ahead` rows later, of
// these or of those that come next (null: none are known).
template <int64_t Rows>
GPO_AMX inline void prefetch_ahead(const AttentionPiece& piece, const FewArrays<Rows>& arrays, const void* now,
                                   const void* next, int64_t i) {
    i += arrays.ahead;
    if (i >= piece.count) i -= piece.count, now = next;
    if (i < piece.count && now) prefetch_row(static_cast<const bf16*>(now) + arrays.places[i], piece.dim);
}

template <int64_t Rows>
GPO_AMX inline void pack_few_queries(const AttentionPiece& piece, FewArrays<Rows>& arrays) {
    alignas(64) pair row[16];
    for (int64_t d = 0; d < arrays.dim; d += 32) {
        for (int64_t r = 0; r < Rows; ++r) {
            const float* from = piece.query + r * piece.padded + d;
            const __mmask16 there = r < piece.rows ? 0xffff : 0;
            const __m512 low = _mm512_maskz_loadu_ps(there & first_lanes(piece.padded - d), from);
            const __m512 high = _mm512_maskz_loadu_ps(there & first_lanes(piece.padded - d - 16), from + 16);
            const __m512i narrow = (__m512i)_mm512_cvtne2ps_pbh(high, low);
            if constexpr (Rows == 2) {
                _mm512_store_si512(arrays.queries + (r * arrays.dim + d) / 2, narrow);
            } else {
                _mm512_store_si512(row, narrow);
                for (int64_t i = 0; i < 16; ++i) arrays.queries[(d / 2 + i) * Rows + r] = row[i];
            }
        }
    }
}

// S [keys, Rows]. Keys of one page lie at equal distances: where pages hold whole tiles, those are loaded in place,
// with what else is on the page beyond the piece's keys, which no row sees.
template <int64_t Rows>
GPO_AMX inline void score_few_keys(const AttentionPiece& piece, FewArrays<Rows>& arrays) {
    const bool in_place = piece.block_size % 16 == 0 && piece.first % 16 == 0 && piece.dim % 32 == 0;
    const bf16* keys = static_cast<const bf16*>(piece.keys);
    const int64_t stride = in_place ? piece.slot_stride : arrays.dim;
    // Of the rows to ask for at 16 keys, a part with each of their products.
    const int64_t part = (16 * 32 + arrays.dim - 1) / arrays.dim;
    const auto ask = [&](int64_t t, int64_t d) GPO_AMX {
        for (int64_t i = d / 32 * part; i < std::min<int64_t>(16, (d / 32 + 1) * part); ++i)
            prefetch_ahead(piece, arrays, piece.keys, piece.values, t + i);
    };
    AmxConfiguration few;
    for (const int tile : {0, 1, 6}) few.row_bytes[tile] = Rows * sizeof(float);
    AmxTiles::set_up(few);
    for (int64_t start = 0; start < piece.count; start += kKeyBlock) {
        if (!in_place)
            for (int64_t t = start; t < std::min<int64_t>(piece.count, start + kKeyBlock); ++t)
                copy_row(keys + arrays.places[t], piece.dim, arrays.dim, arrays.key_block + (t - start) * arrays.dim);
        const bool wide = start + 16 < piece.count;
        const bf16* first = in_place ? keys + arrays.places[start] : arrays.key_block;
        const bf16* second = in_place && wide ? keys + arrays.places[start + 16] : arrays.key_block + 16 * arrays.dim;
        finish_stores();
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t d = 0; d < arrays.dim; d += 32) {
            _tile_loadd(6, arrays.queries + d / 2 * Rows, Rows * sizeof(pair));
            _tile_loadd(4, first + d, stride * sizeof(bf16));
            _tile_dpbf16ps(0, 4, 6);
            ask(start, d);
            if (!wide) continue;
            _tile_loadd(5, second + d, stride * sizeof(bf16));
            _tile_dpbf16ps(1, 5, 6);
            ask(start + 16, d);
        }
        float* scores = arrays.scores + start * Rows;
        _tile_stored(0, scores, Rows * sizeof(float));
        _tile_stored(1, scores + 16 * Rows, Rows * sizeof(float));
        finish_stores();
    }
    AmxTiles::set_up(AmxConfiguration{});
}

// Lane i: the sum of the lanes of vectors[i].
GPO_AMX inline __m512 sums_of_lanes(__m512 (&vectors)[16]) {
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2)  // each quarter holds parts of i, i + 1, i, i + 1
        vectors[i / 2] = _mm512_add_ps(_mm512_unpacklo_ps(vectors[i], vectors[i + 1]),
                                       _mm512_unpackhi_ps(vectors[i], vectors[i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2)  // each quarter holds parts of 2 i to 2 i + 3
        vectors[i / 2] = _mm512_add_ps(_mm512_shuffle_ps(vectors[i], vectors[i + 1], 0x44),
                                       _mm512_shuffle_ps(vectors[i], vectors[i + 1], 0xee));
    const auto add_quarters = [](__m512 a, __m512 b) GPO_AMX {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    return add_quarters(add_quarters(vectors[0], vectors[1]), add_quarters(vectors[2], vectors[3]));
}

// S [keys, 2], 8 keys at a time, which are read one after the other. Tiles read a line of 16 keys, then the next line:
// from memory that is slower, and of two rows it saves too little.
GPO_AMX inline void score_keys_of_two(const AttentionPiece& piece, FewArrays<2>& arrays) {
    const bf16 *first = reinterpret_cast<const bf16*>(arrays.queries), *second = first + arrays.dim;
    for (int64_t t = 0; t < piece.count; t += 8) {
        __m512 sums[16];
#pragma GCC unroll 8
        for (int64_t i = 0; i < 8; ++i) {
            const bf16* key = static_cast<const bf16*>(piece.keys) + arrays.places[t + i];
            prefetch_ahead(piece, arrays, piece.keys, piece.values, t + i);
            sums[2 * i] = sums[2 * i + 1] = _mm512_setzero_ps();
            for (int64_t d = 0; d < piece.dim; d += 32) {
                const __m512bh part = as_bf16(_mm512_maskz_loadu_epi16(first_halves(piece.dim - d), key + d));
                sums[2 * i] = _mm512_dpbf16_ps(sums[2 * i], as_bf16(_mm512_load_si512(first + d)), part);
                sums[2 * i + 1] = _mm512_dpbf16_ps(sums[2 * i + 1], as_bf16(_mm512_load_si512(second + d)), part);
            }
        }
        _mm512_store_ps(arrays.scores + 2 * t, sums_of_lanes(sums));
    }
}

// The largest, or the sum, of the lanes of each row.
template <int64_t Rows, typename Combine>
GPO_AMX inline __m512 over_keys(__m512 lanes, const Combine& combine) {
    lanes = combine(lanes, _mm512_shuffle_f32x4(lanes, lanes, 0x4e));
    if constexpr (Rows <= 4) lanes = combine(lanes, _mm512_shuffle_f32x4(lanes, lanes, 0xb1));
    if constexpr (Rows <= 2) lanes = combine(lanes, _mm512_permute_ps(lanes, 0x4e));
    return lanes;
}

// The weights of pairs of keys, with the rows' maxima and totals. Lane i: row i % Rows, key i / Rows of 16 / Rows.
template <int64_t Rows>
GPO_AMX inline void weigh_few(const AttentionPiece& piece, FewArrays<Rows>& arrays) {
    constexpr int64_t kKeys = 16 / Rows;
    alignas(64) int32_t seen_by[16];
    alignas(32) std::uint16_t pairs_of[16];
    for (int64_t i = 0; i < 16; ++i) {
        const int64_t row = i % Rows, key = i / Rows;
        seen_by[i] = row < piece.rows ? std::min(piece.visible[row] - piece.first, piece.count) - key : 0;
        pairs_of[i] = static_cast<std::uint16_t>((i / 2 / Rows * 2 + i % 2) * Rows + i / 2 % Rows);
    }
    const __m512i seen = _mm512_load_si512(seen_by);
    const __m256i together = _mm256_load_si256(reinterpret_cast<const __m256i*>(pairs_of));
    const __m512 scale = _mm512_set1_ps(piece.softcap > 0 ? 1.0f : piece.scale);
    __m512 highest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    for (int64_t t = 0; t < piece.count; t += kKeys) {
        const __mmask16 sees = _mm512_cmpgt_epi32_mask(seen, _mm512_set1_epi32(static_cast<int>(t)));
        highest = _mm512_mask_max_ps(highest, sees, highest, _mm512_load_ps(arrays.scores + t * Rows));
    }
    highest = over_keys<Rows>(highest, [](__m512 a, __m512 b) GPO_AMX { return _mm512_max_ps(a, b); });
    highest = _mm512_mul_ps(highest, scale);
    __m512 total = _mm512_setzero_ps();
    for (int64_t t = 0; t < piece.count; t += kKeys) {
        const __mmask16 sees = _mm512_cmpgt_epi32_mask(seen, _mm512_set1_epi32(static_cast<int>(t)));
        const __m512 score = _mm512_load_ps(arrays.scores + t * Rows);
        const __m512 weight = _mm512_maskz_mov_ps(sees, exp_ps(_mm512_fmsub_ps(score, scale, highest)));
        total = _mm512_add_ps(total, weight);
        const __m256i narrow = _mm256_permutexvar_epi16(together, (__m256i)_mm512_cvtneps_pbh(weight));
        _mm256_store_si256(reinterpret_cast<__m256i*>(arrays.weights + t / 2 * Rows), narrow);
    }
    total = over_keys<Rows>(total, [](__m512 a, __m512 b) GPO_AMX { return _mm512_add_ps(a, b); });
    const __mmask16 there = first_lanes(piece.rows);
    _mm512_mask_storeu_ps(piece.highest, there, highest);
    _mm512_mask_storeu_ps(piece.total, there, total);
}

// Sums of the values of `Used` rows, two keys in one product: `Parts` times 32 columns from `d` on.
template <int64_t Rows, int64_t Used, int64_t Parts>
GPO_AMX inline void add_columns(const AttentionPiece& piece, const FewArrays<Rows>& arrays, int64_t d) {
    const bf16* values = static_cast<const bf16*>(piece.values) + d;
    __mmask32 inside[Parts];
    __m512 low[Parts][Used], high[Parts][Used];  // of each 8 columns the first and the last 4
#pragma GCC unroll 4
    for (int64_t p = 0; p < Parts; ++p) {
        inside[p] = first_halves(piece.dim - d - 32 * p);
#pragma GCC unroll 8
        for (int64_t r = 0; r < Used; ++r) low[p][r] = high[p][r] = _mm512_setzero_ps();
    }
    for (int64_t t = 0; t < piece.count; t += 2) {
        if (d == 0) {
            prefetch_ahead(piece, arrays, piece.values, piece.next_keys, t);
            prefetch_ahead(piece, arrays, piece.values, piece.next_keys, t + 1);
        }
        const bf16 *even_row = values + arrays.places[t], *odd_row = values + arrays.places[t + 1];
        const pair* weights = arrays.weights + t / 2 * Rows;
#pragma GCC unroll 4
        for (int64_t p = 0; p < Parts; ++p) {
            const __m512i even = _mm512_maskz_loadu_epi16(inside[p], even_row + 32 * p);
            const __m512i odd = _mm512_maskz_loadu_epi16(inside[p], odd_row + 32 * p);
            const __m512bh first = as_bf16(_mm512_unpacklo_epi16(even, odd));
            const __m512bh second = as_bf16(_mm512_unpackhi_epi16(even, odd));
#pragma GCC unroll 8
            for (int64_t r = 0; r < Used; ++r) {
                const __m512bh weight = as_bf16(_mm512_set1_epi32(static_cast<int>(weights[r])));
                low[p][r] = _mm512_dpbf16_ps(low[p][r], weight, first);
                high[p][r] = _mm512_dpbf16_ps(high[p][r], weight, second);
            }
        }
    }
    const __m512i front = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i back = _mm512_add_epi32(front, _mm512_set1_epi32(8));
#pragma GCC unroll 4
    for (int64_t p = 0; p < Parts; ++p) {
#pragma GCC unroll 8
        for (int64_t r = 0; r < Used; ++r) {
            const int64_t column = d + 32 * p;
            float* to = piece.sum + r * piece.padded + column;
            _mm512_storeu_ps(to, _mm512_permutex2var_ps(low[p][r], front, high[p][r]));
            if (column + 16 < piece.padded)
                _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(low[p][r], back, high[p][r]));
        }
    }
}

// Whole values at a time, as far as their sums fit the registers.
template <int64_t Rows, int64_t Used>
GPO_AMX inline void add_few_values(const AttentionPiece& piece, const FewArrays<Rows>& arrays) {
    constexpr int64_t kParts = Used <= 2 ? 4 : Used <= 4 ? 2 : 1;
    int64_t d = 0;
    for (; d + 32 * kParts <= arrays.dim; d += 32 * kParts) add_columns<Rows, Used, kParts>(piece, arrays, d);
    for (; d < arrays.dim; d += 32) add_columns<Rows, Used, 1>(piece, arrays, d);
}

template <int64_t Rows, int64_t Used>
GPO_AMX inline void attend_few(const AttentionPiece& piece, Scratch& scratch) {
    FewArrays<Rows> arrays(piece, scratch);
    find_keys(piece, arrays.places);
    std::fill(arrays.places + piece.count, arrays.places + arrays.keys, arrays.places[piece.count - 1]);
    pack_few_queries(piece, arrays);
    if constexpr (Rows == 2) {
        score_keys_of_two(piece, arrays);
    } else {
        score_few_keys(piece, arrays);
    }
    if (piece.softcap > 0) cap_scores(piece, piece.count * Rows, arrays.scores);
    weigh_few(piece, arrays);
    add_few_values<Rows, Used>(piece, arrays);
}

GPO_AMX inline void attend_bfloat16(const AttentionPiece& piece) {
    static thread_local Scratch scratch;
    switch (piece.rows) {
        case 1:
            return attend_few<2, 1>(piece, scratch);
        case 2:
            return attend_few<2, 2>(piece, scratch);
        case 3:
            return attend_few<4, 3>(piece, scratch);
        case 4:
            return attend_few<4, 4>(piece, scratch);
        case 5:
            return attend_few<8, 5>(piece, scratch);
        case 6:
            return attend_few<8, 6>(piece, scratch);
        case 7:
            return attend_few<8, 7>(piece, scratch);
        case 8:
            return attend_few<8, 8>(piece, scratch);
        default:
            break;
    }
    PieceArrays arrays(piece, scratch);
    find_keys(piece, arrays.places);
    pack_queries(piece, arrays);
    score_keys(piece, arrays);
    if (piece.softcap > 0) cap_scores(piece, piece.count * arrays.rows, arrays.scores);
    for (int64_t r = 0; r < arrays.rows; r += 16) weigh(piece, arrays, r);
    transpose_values(piece, arrays);
    for (int64_t d = 0; d < arrays.dim; d += 32)
        multiply_blocks(arrays.values + d * arrays.keys, arrays.keys, arrays.weights, arrays.rows, arrays.keys / 32,
                        arrays.sums + d * arrays.rows);
    store_sums(piece, arrays);
}

}  // namespace gpo_fast::cpu::amx

#endif  // __x86_64__ && __linux__
