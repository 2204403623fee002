// Matrix products of bfloat16 with float32 sums by AMX, Intel's matrix unit: the packed panels of
// linear_logprob_gemm.h, which are its native layout of the right operand, at several times the speed of
// `vdpbf16ps`.
//
// Usage: where `amx_supported()`, each thread holds an `AmxTiles` while it calls `amx_multiply`. The tile
// registers belong to the thread, and what they hold is lost where it calls other code that uses AMX.
#pragma once

#if defined(__x86_64__) && defined(__linux__)

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "cpu/linear_logprob_gemm.h"

#define GPO_HAS_AMX 1
#define GPO_AMX __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))

namespace gpo_fast::cpu {

// Whether this CPU has AMX with BF16 and the kernel lets this process use it (it is asked once).
inline bool amx_supported() noexcept {
    static const bool supported = [] {
        unsigned eax, ebx, ecx, edx;
        if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
        constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
        if ((edx & kBf16) == 0 || (edx & kTile) == 0 || !__builtin_cpu_supports("avx512bf16")) return false;
        constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    }();
    return supported;
}

constexpr std::size_t kAmxRows = 32;   // rows of a block: two tiles of 16
constexpr std::size_t kAmxPairs = 16;  // pairs of k that a tile holds

// What `ldtilecfg` reads. The accumulators are tiles 0 to 3.
struct alignas(64) AmxConfiguration {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The tile registers of this thread, set up for blocks of 32 rows.
class AmxTiles {
  public:
    GPO_AMX AmxTiles() { set_up(AmxConfiguration{}); }
    GPO_AMX ~AmxTiles() { _tile_release(); }
    AmxTiles(const AmxTiles&) = delete;
    AmxTiles& operator=(const AmxTiles&) = delete;

    GPO_AMX static void set_up(const AmxConfiguration& configuration) {
        __asm__ volatile("" ::: "memory");
        _tile_loadconfig(&configuration);
    }
};

namespace amx {

// gcc's tile intrinsics do not tell the compiler that they read memory.
inline void finish_stores() { __asm__ volatile("" ::: "memory"); }

GPO_AMX inline void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

constexpr std::size_t kStepsAhead = 8;  // of a strip that comes from memory

// Asks for `Bytes` of a strip. It is read as it lies, which the hardware foresees too; asked for in portions between
// the products of a step, memory is hardly ever idle.
template <int Bytes>
GPO_AMX inline void prefetch(const char* from) {
#pragma GCC unroll 32
    for (int byte = 0; byte < Bytes; byte += 64) _mm_prefetch(from + byte, _MM_HINT_T1);
}

// c (17 to 32, 32) = or += a (.., 32 steps) b (32 steps, 32), a row of pairs in b `ldb` after the one before. `ahead`:
// b is a strip that comes from memory.
GPO_AMX inline void tall_block(const bf16* a, std::size_t lda, const pair* b, std::size_t ldb, std::size_t steps,
                               float* c, std::size_t ldc, bool accumulate, bool ahead = false) {
    const std::size_t a_bytes = lda * sizeof(bf16), b_bytes = ldb * sizeof(pair), c_bytes = ldc * sizeof(float);
    finish_stores();
    if (accumulate) {
        _tile_loadd(0, c, c_bytes);
        _tile_loadd(1, c + 16, c_bytes);
        _tile_loadd(2, c + 16 * ldc, c_bytes);
        _tile_loadd(3, c + 16 * ldc + 16, c_bytes);
    } else {
        zero_sums();
    }
    for (std::size_t step = 0; step < steps; ++step) {
        const pair* right = b + step * kAmxPairs * ldb;
        const char* later = reinterpret_cast<const char*>(right + kStepsAhead * kAmxPairs * ldb);
        _tile_loadd(6, right, b_bytes);
        _tile_loadd(4, a + step * 2 * kAmxPairs, a_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if (ahead) prefetch<1024>(later);
        _tile_loadd(7, right + 16, b_bytes);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + 16 * lda + step * 2 * kAmxPairs, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
        if (ahead) prefetch<1024>(later + 1024);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + 16, c_bytes);
    _tile_stored(2, c + 16 * ldc, c_bytes);
    _tile_stored(3, c + 16 * ldc + 16, c_bytes);
}

// c (1 to 16, 64) = or += a (.., 32 steps) times the two halves of a panel.
GPO_AMX inline void flat_block(const bf16* a, std::size_t lda, const pair* first, const pair* second, std::size_t ldb,
                               std::size_t steps, float* c, std::size_t ldc, bool accumulate, bool ahead = false) {
    const std::size_t a_bytes = lda * sizeof(bf16), b_bytes = ldb * sizeof(pair), c_bytes = ldc * sizeof(float);
    finish_stores();
    if (accumulate) {
        _tile_loadd(0, c, c_bytes);
        _tile_loadd(1, c + 16, c_bytes);
        _tile_loadd(2, c + 32, c_bytes);
        _tile_loadd(3, c + 48, c_bytes);
    } else {
        zero_sums();
    }
    for (std::size_t step = 0; step < steps; ++step) {
        const pair *left = first + step * kAmxPairs * ldb, *right = second + step * kAmxPairs * ldb;
        _tile_loadd(4, a + step * 2 * kAmxPairs, a_bytes);
        _tile_loadd(5, left, b_bytes);
        _tile_dpbf16ps(0, 4, 5);
        if (ahead) prefetch<2048>(reinterpret_cast<const char*>(left + kStepsAhead * kAmxPairs * ldb));
        _tile_loadd(6, left + 16, b_bytes);
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(7, right, b_bytes);
        _tile_dpbf16ps(2, 4, 7);
        if (ahead) prefetch<2048>(reinterpret_cast<const char*>(right + kStepsAhead * kAmxPairs * ldb));
        _tile_loadd(5, right + 16, b_bytes);
        _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + 16, c_bytes);
    _tile_stored(2, c + 32, c_bytes);
    _tile_stored(3, c + 48, c_bytes);
}

}  // namespace amx

// A panel as its left and its right 32 columns, a row of pairs `ldb` after the one before.
struct PanelHalves {
    const pair* half[2];
    std::size_t ldb;
};

// c (rows, 64) = or += a (rows, 2 pairs) times a panel (pairs, 64). What is left of `pairs` after whole tiles is added
// by `vdpbf16ps`: nothing is read beyond the operands. `ahead`: the halves are strips (ldb = 32) that come from memory.
GPO_AMX inline void amx_multiply_panel(const bf16* a, std::size_t lda, std::size_t rows, const PanelHalves& panel,
                                       std::size_t pairs, float* c, std::size_t ldc, bool accumulate,
                                       bool ahead = false) {
    const std::size_t steps = pairs / kAmxPairs, done = steps * kAmxPairs, ldb = panel.ldb;
    if (steps > 0) {
        const std::size_t whole = rows / kAmxRows * kAmxRows, rest = rows - whole;
        for (int h = 0; h < 2; ++h)
            for (std::size_t i = 0; i < whole; i += kAmxRows)
                amx::tall_block(a + i * lda, lda, panel.half[h], ldb, steps, c + i * ldc + 32 * h, ldc, accumulate,
                                ahead && i == 0);
        if (rest > 0) {
            const bf16* last = a + whole * lda;
            float* out = c + whole * ldc;
            AmxConfiguration fewer;
            if (rest <= 16) {
                for (int tile = 0; tile <= 4; ++tile) fewer.rows[tile] = static_cast<std::uint8_t>(rest);
                AmxTiles::set_up(fewer);
                amx::flat_block(last, lda, panel.half[0], panel.half[1], ldb, steps, out, ldc, accumulate,
                                ahead && whole == 0);
            } else {
                for (const int tile : {2, 3, 5}) fewer.rows[tile] = static_cast<std::uint8_t>(rest - 16);
                AmxTiles::set_up(fewer);
                for (int h = 0; h < 2; ++h)
                    amx::tall_block(last, lda, panel.half[h], ldb, steps, out + 32 * h, ldc, accumulate,
                                    ahead && whole == 0);
            }
            AmxTiles::set_up(AmxConfiguration{});
        }
    }
    if (done == pairs && steps > 0) return;
    for (int h = 0; h < 2; ++h)
        multiply_columns<2>(a + 2 * done, lda, rows, panel.half[h] + done * ldb, ldb, pairs - done, c + 32 * h, ldc,
                            accumulate || steps > 0);
}

// c (rows, columns) = or += a (rows, 2 pairs) b, with b packed and columns a multiple of 64.
GPO_AMX inline void amx_multiply(const bf16* a, std::size_t lda, std::size_t rows, const pair* b, std::size_t pairs,
                                 std::size_t columns, float* c, std::size_t ldc, bool accumulate) {
    for (std::size_t i = 0; i < rows; i += kAmxRows)
        for (std::size_t j = 0; j < columns; j += kPanel) {
            const pair* panel = b + j * pairs;
            amx_multiply_panel(a + i * lda, lda, rows - i < kAmxRows ? rows - i : kAmxRows,
                               {{panel, panel + kPanel / 2}, kPanel}, pairs, c + i * ldc + j, ldc, accumulate);
        }
}

}  // namespace gpo_fast::cpu

#else

namespace gpo_fast::cpu {
inline bool amx_supported() noexcept { return false; }
}  // namespace gpo_fast::cpu

#endif  // __x86_64__ && __linux__
