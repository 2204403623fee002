// Matrix products of bfloat16 with float32 accumulation (AVX-512 BF16), blocked for one core.
//
// The right-hand matrix is packed into panels of 64 columns in which two consecutive k lie together, as
// `vdpbf16ps` takes them; the left-hand matrix is read in place. Only for files that know the CPU has the
// instructions.
#pragma once

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#define GPO_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))

namespace gpo_fast::cpu {

using bf16 = std::uint16_t;
using pair = std::uint32_t;  // two bf16

constexpr std::size_t kPanel = 64;  // columns of a panel: four registers of float32
constexpr int kTileSums = 24;       // registers of sums of a tile: the rest is for the operands

inline std::size_t round_up(std::size_t n, std::size_t step) { return (n + step - 1) / step * step; }

GPO_AVX512 inline __m512bh as_bf16(__m512i value) { return (__m512bh)value; }

// c (R, 16 V) = or += a (R, 2 pairs) b (pairs, 16 V), a row of pairs `ldb` after the one before.
template <int R, int V>
GPO_AVX512 inline void tile(const bf16* a, std::size_t lda, const pair* b, std::size_t ldb, std::size_t pairs, float* c,
                            std::size_t ldc, bool accumulate) {
    __m512 sum[R][V];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j)
            sum[r][j] = accumulate ? _mm512_loadu_ps(c + r * ldc + 16 * j) : _mm512_setzero_ps();
    for (std::size_t k = 0; k < pairs; ++k) {
        __m512bh right[V];
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) right[j] = as_bf16(_mm512_load_si512(b + k * ldb + 16 * j));
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            std::int32_t both;
            std::memcpy(&both, a + r * lda + 2 * k, sizeof both);
            const __m512bh left = as_bf16(_mm512_set1_epi32(both));
#pragma GCC unroll 4
            for (int j = 0; j < V; ++j) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], left, right[j]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) _mm512_storeu_ps(c + r * ldc + 16 * j, sum[r][j]);
}

// The same of at most R rows.
template <int R, int V>
GPO_AVX512 inline void tile_of(std::size_t rows, const bf16* a, std::size_t lda, const pair* b, std::size_t ldb,
                               std::size_t pairs, float* c, std::size_t ldc, bool accumulate) {
    if constexpr (R > 0) {
        if (rows == R) return tile<R, V>(a, lda, b, ldb, pairs, c, ldc, accumulate);
        tile_of<R - 1, V>(rows, a, lda, b, ldb, pairs, c, ldc, accumulate);
    }
}

// The same of any number of rows.
template <int V>
GPO_AVX512 inline void multiply_columns(const bf16* a, std::size_t lda, std::size_t rows, const pair* b,
                                        std::size_t ldb, std::size_t pairs, float* c, std::size_t ldc,
                                        bool accumulate) {
    constexpr std::size_t kRows = kTileSums / V;
    for (std::size_t i = 0; i < rows; i += kRows)
        tile_of<kRows, V>(rows - i < kRows ? rows - i : kRows, a + i * lda, lda, b, ldb, pairs, c + i * ldc, ldc,
                          accumulate);
}

// c (rows, columns) = or += a (rows, 2 pairs) b, with b packed and columns a multiple of 64.
GPO_AVX512 inline void multiply(const bf16* a, std::size_t lda, std::size_t rows, const pair* b, std::size_t pairs,
                                std::size_t columns, float* c, std::size_t ldc, bool accumulate) {
    for (std::size_t j = 0; j < columns; j += kPanel)
        multiply_columns<kPanel / 16>(a, lda, rows, b + j * pairs, kPanel, pairs, c + j, ldc, accumulate);
}

GPO_AVX512 inline void transpose_16x16(__m512i (&r)[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    }
}

// Packs b = m^T for a row-major m (columns of b, 2 pairs): `width` even or odd numbers per row, missing ones
// are 0.
GPO_AVX512 inline void pack_transposed(const bf16* m, std::size_t ldm, std::size_t columns, std::size_t width,
                                       pair* packed) {
    const std::size_t pairs = (width + 1) / 2;
    for (std::size_t j = 0; j < round_up(columns, kPanel); j += 16) {
        pair* panel = packed + j / kPanel * kPanel * pairs + j % kPanel;
        for (std::size_t k = 0; k < pairs; k += 16) {
            const std::size_t left = width - 2 * k < 32 ? width - 2 * k : 32;
            const __mmask32 inside = left == 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
            __m512i block[16];
#pragma GCC unroll 16
            for (std::size_t r = 0; r < 16; ++r)
                block[r] = j + r < columns ? _mm512_maskz_loadu_epi16(inside, m + (j + r) * ldm + 2 * k)
                                           : _mm512_setzero_si512();
            transpose_16x16(block);
#pragma GCC unroll 16
            for (std::size_t r = 0; r < 16; ++r)
                if (k + r < pairs) _mm512_store_si512(panel + (k + r) * kPanel, block[r]);
        }
    }
}

// Packs b = m for a row-major m (rows = the k of the product, columns): pairs of rows are interleaved. A panel holds
// `panel_pairs`, more than m has where m is only a part of b.
GPO_AVX512 inline void pack_rows(const bf16* m, std::size_t ldm, std::size_t rows, std::size_t columns, pair* packed,
                                 std::size_t panel_pairs) {
    const std::size_t pairs = (rows + 1) / 2;
    alignas(64) static const std::uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                       8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kLow);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (std::size_t j = 0; j < round_up(columns, kPanel); j += 32) {
        const std::size_t left = j >= columns ? 0 : columns - j < 32 ? columns - j : 32;
        const __mmask32 inside = left == 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
        pair* panel = packed + j / kPanel * kPanel * panel_pairs + j % kPanel;
        for (std::size_t k = 0; k < pairs; ++k) {
            const bf16* row = m + 2 * k * ldm + j;
            const __m512i even = _mm512_maskz_loadu_epi16(inside, row);
            const __m512i odd = 2 * k + 1 < rows ? _mm512_maskz_loadu_epi16(inside, row + ldm) : _mm512_setzero_si512();
            _mm512_store_si512(panel + k * kPanel, _mm512_permutex2var_epi16(even, low, odd));
            _mm512_store_si512(panel + k * kPanel + 16, _mm512_permutex2var_epi16(even, high, odd));
        }
    }
}

// exp(x) for x <= 0 to about one unit in the last place; 0 below the range of float32.
GPO_AVX512 inline __m512 exp_ps(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

GPO_AVX512 inline void store_bf16(bf16* out, __m512 value, __mmask16 mask = 0xffff) {
    _mm256_mask_storeu_epi16(out, mask, (__m256i)_mm512_cvtneps_pbh(value));
}

}  // namespace gpo_fast::cpu

#endif  // __x86_64__
