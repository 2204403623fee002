// The inner loops of the CPU forward pass, compiled once for each instruction set and chosen at run time.
//
// Activations are float32 arrays. In a bfloat16 model their values are rounded to bfloat16 where the reference model
// rounds (`round`), so that widening is exact and products of two of them are exact in float32; sums are float32.
// A packed weight lies in panels of 64 output columns: float32 [depth][64], or bfloat16 in two strips of 32 columns,
// [2][depth / 2][32][2], each read from its start to its end.
#pragma once

#include <cstdint>

namespace gpo_fast::cpu {

constexpr int kPanelColumns = 64;
constexpr int kStripColumns = 32;
constexpr int kKeyTile = 64;  // keys that one pass of the attention loop takes together
constexpr int kFewRows = 8;   // up to so many rows, attention takes as long as the reading of its keys and values

// Attention of `rows` queries over the keys [first, first + count) of a page list: one piece of a larger set.
struct AttentionPiece {
    const float* query;      // [rows, padded]; the columns beyond `dim` are 0
    const int32_t* visible;  // [rows]: how many of the page list's keys, from its start, a row sees
    const void* keys;        // of one KV head: slot s at keys + s * slot_stride elements
    const void* values;
    const void* next_keys;  // as `keys`: those that this thread reads next from the same pages, or null
    const int32_t* pages;
    float* highest;  // [rows]: largest score, -inf where nothing is seen
    float* total;    // [rows]: sum of exp(score - highest)
    float* sum;      // [rows, padded]: sum of exp(score - highest) value
    float* scratch;  // attention_scratch(rows, padded) floats
    int64_t slot_stride;
    int32_t rows, first, count, block_size, dim, padded;
    float scale, softcap;  // of the scores
    bool is_bfloat16;
};

inline int64_t attention_scratch(int64_t rows, int64_t padded) {
    return kKeyTile * (2 * padded + rows);  // keys, values, scores
}

// z = logit / temperature: the largest logit and sums of exp(z - z_max) in blocks of `kSumBlock`.
constexpr int kSumBlock = 512;

struct Kernels {
    const char* name;

    // A thread calls `enter` before it uses the kernels below and `leave` after it (see KernelScope).
    void (*enter)();
    void (*leave)();

    // c [rows, columns] = or += a [rows, depth] b [depth, columns]; columns a multiple of 16.
    void (*multiply)(const float* a, int64_t lda, int64_t rows, const float* b, int64_t ldb, int64_t depth,
                     int64_t columns, float* c, int64_t ldc, bool accumulate);
    // c [rows, 64] = a [rows, depth] times a packed bfloat16 panel. `narrow_a` is `a` in bfloat16 where
    // `needs_narrow`, else unused.
    void (*multiply_panel)(const float* a, const uint16_t* narrow_a, int64_t lda, int64_t rows, const void* panel,
                           int64_t depth, float* c, int64_t ldc);
    bool needs_narrow;

    // to [words, columns] = the transpose of from [rows, words]; rows at most columns, a multiple of 16.
    void (*pack_strip)(const uint32_t* from, int64_t rows, int64_t words, int64_t columns, uint32_t* to);

    void (*widen)(const uint16_t* from, int64_t count, float* to);
    void (*narrow)(const float* from, int64_t count, uint16_t* to);  // round to nearest even
    void (*round_values)(float* values, int64_t count);              // to bfloat16 and back

    void (*rms_norm)(const float* x, const float* weight, int64_t width, float epsilon, bool round, float* out);
    // x = x * cos + rotate_half(x) * sin
    void (*rotate)(float* x, const float* cos, const float* sin, int64_t width, bool round);
    // With `round`, what is given (gate, up, y) is rounded first.
    void (*silu_times)(const float* gate, const float* up, int64_t count, bool round, float* out);
    void (*add)(float* x, const float* y, int64_t count, bool round);  // x += y

    void (*attend)(const AttentionPiece& piece);

    float (*largest)(const float* x, int64_t count);
    double (*sum_exp)(const float* x, int64_t count, float highest, float inverse_temperature);
    void (*exp_into)(const float* x, int64_t count, float highest, float inverse_temperature, float* out);
};

// The best set that this machine runs, or the one that `use_kernels` chose.
const Kernels& kernels();

// The kernels of this thread while it lives.
class KernelScope {
  public:
    KernelScope() { kernels().enter(); }
    ~KernelScope() { kernels().leave(); }
    KernelScope(const KernelScope&) = delete;
    KernelScope& operator=(const KernelScope&) = delete;
};

// "amx", "avx512" (with BF16), "avx2" or "portable"; throws std::invalid_argument where the machine lacks it.
void use_kernels(const char* name);

}  // namespace gpo_fast::cpu
