#include "cpu/kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inline functions of this file only
// GCC 12 warns about its own `_mm512_undefined_ps` wherever it inlines the intrinsics that use it.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include "cpu/amx.h"
#include "cpu/amx_attention.h"
#include "cpu/linear_logprob_gemm.h"

#define GPO_TABLE(NAME, NEEDS_NARROW)                                                              \
    const Kernels kTable{NAME,       nothing, nothing, multiply,     multiply_panel, NEEDS_NARROW, \
                         pack_strip, widen,   narrow,  round_values, rms_norm,       rotate,       \
                         silu_times, add,     attend,  largest,      sum_exp,        exp_into};

namespace gpo_fast::cpu {

namespace {
void nothing() {}
}  // namespace

namespace portable {
namespace {
#define GPO_WIDTH 4
#define GPO_TILE_VECTORS 2
typedef float vec __attribute__((vector_size(16)));
inline vec splat(float x) { return vec{x, x, x, x}; }
inline vec fused(vec a, vec b, vec c) { return a * b + c; }
inline vec vmax(vec a, vec b) { return a > b ? a : b; }
#include "cpu/kernels_impl.h"
GPO_TABLE("portable", false)
#undef GPO_WIDTH
#undef GPO_TILE_VECTORS
}  // namespace
}  // namespace portable

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
namespace {
#define GPO_WIDTH 8
#define GPO_TILE_VECTORS 2
typedef float vec __attribute__((vector_size(32)));
inline vec splat(float x) { return (vec)_mm256_set1_ps(x); }
inline vec fused(vec a, vec b, vec c) { return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline vec vmax(vec a, vec b) { return (vec)_mm256_max_ps((__m256)a, (__m256)b); }
#include "cpu/kernels_impl.h"
GPO_TABLE("avx2", false)
#undef GPO_WIDTH
#undef GPO_TILE_VECTORS
}  // namespace
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#endif
namespace avx512 {
namespace {
#define GPO_WIDTH 16
#define GPO_TILE_VECTORS 4
typedef float vec __attribute__((vector_size(64)));
inline vec splat(float x) { return (vec)_mm512_set1_ps(x); }
inline vec fused(vec a, vec b, vec c) { return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline vec vmax(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
#define multiply_panel multiply_panel_by_widening
#define pack_strip pack_strip_by_words
#include "cpu/kernels_impl.h"
#undef multiply_panel
#undef pack_strip
static void multiply_panel(const float*, const uint16_t* a, int64_t lda, int64_t rows, const void* panel, int64_t depth,
                           float* c, int64_t ldc) {
    const pair* strip = static_cast<const pair*>(panel);
    for (int64_t j = 0; j < kPanelColumns; j += kStripColumns, strip += depth / 2 * kStripColumns)
        cpu::multiply_columns<kStripColumns / kWidth>(a, lda, rows, strip, kStripColumns, depth / 2, c + j, ldc, false);
}
static void pack_strip(const uint32_t* from, int64_t rows, int64_t words, int64_t columns, uint32_t* to) {
    for (int64_t start = 0; start < words; start += 16) {
        const int64_t count = std::min<int64_t>(16, words - start);
        const __mmask16 there = static_cast<__mmask16>((1u << count) - 1);
        for (int64_t row = 0; row < columns; row += 16) {
            __m512i block[16];
            for (int64_t i = 0; i < 16; ++i)
                block[i] = _mm512_maskz_loadu_epi32(row + i < rows ? there : 0, from + (row + i) * words + start);
            transpose_16x16(block);
            for (int64_t i = 0; i < count; ++i) _mm512_storeu_si512(to + (start + i) * columns + row, block[i]);
        }
    }
}
GPO_TABLE("avx512", true)
#undef GPO_WIDTH
#undef GPO_TILE_VECTORS
}  // namespace
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__linux__)
namespace amx {
namespace {

GPO_AMX void enter() { AmxTiles::set_up(AmxConfiguration{}); }
GPO_AMX void leave() { _tile_release(); }

GPO_AMX void multiply_panel(const float*, const uint16_t* a, int64_t lda, int64_t rows, const void* panel,
                            int64_t depth, float* c, int64_t ldc) {
    const pair* strip = static_cast<const pair*>(panel);
    amx_multiply_panel(a, lda, rows, {{strip, strip + depth / 2 * kStripColumns}, kStripColumns}, depth / 2, c, ldc,
                       false, true);
}

void attend(const AttentionPiece& piece) { piece.is_bfloat16 ? attend_bfloat16(piece) : avx512::attend(piece); }

const Kernels kTable = []() noexcept {
    Kernels table = avx512::kTable;
    table.name = "amx";
    table.enter = enter;
    table.leave = leave;
    table.multiply_panel = multiply_panel;
    table.attend = attend;
    return table;
}();

}  // namespace
}  // namespace amx
#endif  // __linux__

#endif  // __x86_64__

namespace {

const Kernels* find_kernels(std::string_view name) {
    if (name == "portable") return &portable::kTable;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (name == "avx2" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2::kTable;
    if (name == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bf16")) {
        return &avx512::kTable;
    }
#if defined(__linux__)
    if (name == "amx" && amx_supported()) return &amx::kTable;
#endif
#endif
    return nullptr;
}

const Kernels* best_kernels() noexcept {
    for (const char* name : {"amx", "avx512", "avx2"}) {
        if (const Kernels* found = find_kernels(name)) return found;
    }
    return &portable::kTable;
}

const Kernels* chosen = best_kernels();

}  // namespace

const Kernels& kernels() { return *chosen; }

void use_kernels(const char* name) {
    const Kernels* found = find_kernels(name);
    if (!found) {
        throw std::invalid_argument(
            "kernels must be 'portable', 'avx2', 'avx512' or 'amx' and run on this machine, got '" + std::string(name) +
            "'");
    }
    chosen = found;
}

}  // namespace gpo_fast::cpu
