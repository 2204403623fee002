#include "cpu/tree_attention.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns about its own `_mm512_undefined_ps` wherever it inlines the intrinsics that use it.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <vector>

#include "cpu/amx.h"
#include "cpu/buffer.h"
#include "cpu/thread_pool.h"

namespace gpo_fast::cpu {

namespace {

constexpr std::int64_t kMaxDim = 256;

}  // namespace

bool tree_attention_supported(std::int64_t dim) {
    return amx_supported() && dim > 0 && dim % 32 == 0 && dim <= kMaxDim;
}

#if defined(GPO_HAS_AMX)

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::size_t kRows = kAmxRows;   // tokens of a left operand
constexpr std::size_t kColumns = kPanel;  // tokens of a right operand

std::size_t tiles_of(std::size_t tokens, std::size_t tile) { return (tokens + tile - 1) / tile; }

enum class Seen { kNone, kSome, kAll };

// Which keys which queries see.
class Visibility {
  public:
    Visibility(const std::int32_t* subtree_end, std::size_t tokens)
        : ends_(tiles_of(tokens, kColumns) * kColumns, 0), least_(ends_.size() / kRows), most_(ends_.size() / kRows) {
        std::copy_n(subtree_end, tokens, ends_.begin());
        for (std::size_t tile = 0; tile < least_.size(); ++tile) {
            const auto [least, most] =
                std::minmax_element(ends_.begin() + tile * kRows, ends_.begin() + (tile + 1) * kRows);
            least_[tile] = *least;
            most_[tile] = *most;
        }
    }

    // With ends of 0 behind the last token: nobody sees those keys, and those queries see nothing.
    const std::int32_t* ends() const { return ends_.data(); }

    // Of the queries [query, query_end) and the keys [key, key_end), whole tiles both.
    Seen seen(std::size_t query, std::size_t query_end, std::size_t key, std::size_t key_end) const {
        std::int32_t least = std::numeric_limits<std::int32_t>::max(), most = 0;
        for (std::size_t tile = key / kRows; tile < key_end / kRows; ++tile) {
            least = std::min(least, least_[tile]);
            most = std::max(most, most_[tile]);
        }
        if (key >= query_end || static_cast<std::size_t>(most) <= query) return Seen::kNone;
        const bool all = key_end <= query + 1 && static_cast<std::size_t>(least) >= query_end;
        return all ? Seen::kAll : Seen::kSome;
    }

  private:
    std::vector<std::int32_t> ends_, least_, most_;
};

// One tensor's heads as right operands, in tiles of 64 tokens: for products over dim (x^T) and over tokens (x).
struct RightOperand {
    RightOperand(std::size_t tokens, std::size_t heads, std::size_t dim)
        : tokens(tokens),
          dim(dim),
          tiles(tiles_of(tokens, kColumns)),
          dim_size(dim / 2 * kColumns),
          token_size(kColumns / 2 * round_up(dim, kPanel)),
          over_dim(heads * tiles * dim_size),
          over_tokens(heads * tiles * token_size) {}

    GPO_AVX512 void pack(const HeadsView& view, std::size_t head, std::size_t tile) {
        const std::size_t first = tile * kColumns, count = std::min(kColumns, tokens - first);
        const bf16* rows = view.data + head * view.head_stride + first * view.token_stride;
        pack_transposed(rows, view.token_stride, count, dim, over_dim.get() + (head * tiles + tile) * dim_size);
        pair* packed = over_tokens.get() + (head * tiles + tile) * token_size;
        if (count < kColumns) std::memset(packed, 0, token_size * sizeof(pair));
        pack_rows(rows, view.token_stride, count, dim, packed, kColumns / 2);
    }

    // c (32, 64) = a (32, dim) x^T, x being the tile that begins with token `first`.
    GPO_AMX void multiply_over_dim(const bf16* a, std::size_t head, std::size_t first, float* c) const {
        const pair* tile = over_dim.get() + (head * tiles + first / kColumns) * dim_size;
        for (std::size_t j = 0; j < kColumns; j += 32)
            amx::tall_block(a, dim, tile + j, kPanel, dim / 32, c + j, kColumns, false);
    }

    // c (32, dim) += a (32, 64) x.
    GPO_AMX void add_over_tokens(const bf16* a, std::size_t head, std::size_t first, float* c) const {
        const pair* tile = over_tokens.get() + (head * tiles + first / kColumns) * token_size;
        for (std::size_t j = 0; j < dim; j += 32)
            amx::tall_block(a, kColumns, tile + j / kPanel * kPanel * kColumns / 2 + j % kPanel, kPanel, kColumns / 32,
                            c + j, dim, true);
    }

    std::size_t tokens, dim, tiles, dim_size, token_size;
    Buffer<pair> over_dim, over_tokens;
};

// What a thread works on: two left operands, two products with right ones, their results as left operands and the
// sums that become a tile of the output.
struct alignas(64) Scratch {
    bf16 left[2][kRows * kMaxDim];
    float product[2][kRows * kColumns];
    bf16 weights[2][kRows * kColumns];
    float sum[2][kRows * kMaxDim];
};

// Runs work(0, scratch) .. work(count - 1, scratch), each on one of the threads, which has its own tile registers.
template <typename Work>
void for_each_task(std::int64_t count, int threads, const Work& work) {
    Tasks tasks;
    run_parallel(threads, [&](int) {
        const AmxTiles tiles;
        const std::unique_ptr<Scratch> scratch(new Scratch);  // not zeroed, as make_unique would
        for (std::int64_t task; tasks.take(count, task);) work(static_cast<std::size_t>(task), *scratch);
    });
}

// 32 rows of one head from token `first` on; rows behind the last token are zeros.
void load_rows(const HeadsView& view, std::size_t head, std::size_t first, std::size_t tokens, std::size_t dim,
               bf16* out) {
    const std::size_t count = std::min(kRows, tokens - first);
    const bf16* row = view.data + head * view.head_stride + first * view.token_stride;
    for (std::size_t r = 0; r < count; ++r, row += view.token_stride)
        std::memcpy(out + r * dim, row, dim * sizeof(bf16));
    std::memset(out + count * dim, 0, (kRows - count) * dim * sizeof(bf16));
}

GPO_AVX512 void store_row(const float* row, std::size_t dim, float factor, bf16* out) {
    for (std::size_t d = 0; d < dim; d += 16)
        store_bf16(out + d, _mm512_mul_ps(_mm512_loadu_ps(row + d), _mm512_set1_ps(factor)));
}

// The rows of `sum` times `factor` into out (tokens, heads, dim).
GPO_AVX512 void store_rows(const float* sum, std::size_t head, std::size_t heads, std::size_t first, std::size_t tokens,
                           std::size_t dim, float factor, bf16* out) {
    const std::size_t count = std::min(kRows, tokens - first);
    for (std::size_t r = 0; r < count; ++r)
        store_row(sum + r * dim, dim, factor, out + ((first + r) * heads + head) * dim);
}

GPO_AVX512 __m512i counted_from(std::size_t first) {
    return _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)),
                            _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
}

// Which of the 16 keys from `key` on the query sees.
GPO_AVX512 __mmask16 keys_seen(std::size_t query, std::size_t key, const std::int32_t* ends) {
    const __m512i i = _mm512_set1_epi32(static_cast<int>(query));
    return _mm512_cmple_epi32_mask(counted_from(key), i) & _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(ends + key), i);
}

// Which of the 16 queries from `query` on see the key.
GPO_AVX512 __mmask16 queries_seeing(std::size_t query, std::size_t key, const std::int32_t* ends) {
    const __m512i i = counted_from(query);
    return _mm512_cmpge_epi32_mask(i, _mm512_set1_epi32(static_cast<int>(key))) &
           _mm512_cmplt_epi32_mask(i, _mm512_set1_epi32(ends[key]));
}

// exp(x) that is 0 for -infinity; NaN stays NaN.
GPO_AVX512 __m512 exp_or_zero(__m512 x) { return exp_ps(_mm512_max_ps(_mm512_set1_ps(-200.0f), x)); }

// The online softmax of 32 queries: of what they have seen so far, its maxima and, lane by lane, its mass.
struct alignas(64) Softmax {
    float mass[kRows][16];
    float top[kRows];
};

// Takes in the query's next 64 scores: their weights exp(z - max) go to `weights`; the sums follow a new maximum.
template <bool kMasked>
GPO_AVX512 void take_row(const float* scores, float scale, std::size_t query, std::size_t key, const std::int32_t* ends,
                         std::size_t dim, float& top, float* mass, float* sum, bf16* weights) {
    __m512 z[4];
#pragma GCC unroll 4
    for (std::size_t j = 0; j < 4; ++j) {
        z[j] = _mm512_mul_ps(_mm512_loadu_ps(scores + 16 * j), _mm512_set1_ps(scale));
        if (kMasked)
            z[j] = _mm512_mask_blend_ps(keys_seen(query, key + 16 * j, ends), _mm512_set1_ps(-kInfinity), z[j]);
    }
    const float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(z[0], z[1]), _mm512_max_ps(z[2], z[3])));
    if (most > top) {
        const __m512 shrink = _mm512_set1_ps(std::exp(top - most));
        for (std::size_t d = 0; d < dim; d += 16)
            _mm512_storeu_ps(sum + d, _mm512_mul_ps(_mm512_loadu_ps(sum + d), shrink));
        _mm512_storeu_ps(mass, _mm512_mul_ps(_mm512_loadu_ps(mass), shrink));
        top = most;
    }
    const __m512 origin = _mm512_set1_ps(top == -kInfinity ? 0.0f : top);
    __m512 total = _mm512_loadu_ps(mass);
#pragma GCC unroll 4
    for (std::size_t j = 0; j < 4; ++j) {
        const __m512 e = exp_or_zero(_mm512_sub_ps(z[j], origin));
        total = _mm512_add_ps(total, e);
        store_bf16(weights + 16 * j, e);
    }
    _mm512_storeu_ps(mass, total);
}

template <bool kMasked>
GPO_AVX512 void take_scores(const TreeAttentionInputs& in, const Visibility& visibility, std::size_t query,
                            std::size_t key, Softmax& softmax, Scratch& scratch) {
    for (std::size_t r = 0; r < kRows; ++r)
        take_row<kMasked>(scratch.product[0] + r * kColumns, in.scale, query + r, key, visibility.ends(), in.dim,
                          softmax.top[r], softmax.mass[r], scratch.sum[0] + r * in.dim,
                          scratch.weights[0] + r * kColumns);
}

GPO_AMX void forward_tile(const TreeAttentionInputs& in, const Visibility& visibility, const RightOperand& key,
                          const RightOperand& value, std::size_t head, std::size_t query, Scratch& scratch, bf16* out,
                          float* lse) {
    const std::size_t dim = in.dim, tokens = in.tokens, kv_head = head / (in.heads / in.kv_heads);
    Softmax softmax = {};
    std::fill_n(softmax.top, kRows, -kInfinity);
    std::memset(scratch.sum[0], 0, kRows * dim * sizeof(float));
    load_rows(in.query, head, query, tokens, dim, scratch.left[0]);
    for (std::size_t first = 0; first < std::min(query + kRows, tokens); first += kColumns) {
        const Seen seen = visibility.seen(query, query + kRows, first, first + kColumns);
        if (seen == Seen::kNone) continue;
        key.multiply_over_dim(scratch.left[0], kv_head, first, scratch.product[0]);
        const auto take = seen == Seen::kAll ? take_scores<false> : take_scores<true>;
        take(in, visibility, query, first, softmax, scratch);
        value.add_over_tokens(scratch.weights[0], kv_head, first, scratch.sum[0]);
    }
    for (std::size_t r = 0; r < std::min(kRows, tokens - query); ++r) {
        const float mass = _mm512_reduce_add_ps(_mm512_loadu_ps(softmax.mass[r]));
        lse[head * tokens + query + r] = softmax.top[r] + std::log(mass);
        store_row(scratch.sum[0] + r * dim, dim, 1.0f / mass, out + ((query + r) * in.heads + head) * dim);
    }
}

// The log-sum-exps of the forward pass and sum(grad_out * out), each (heads, whole tiles of tokens).
struct RowSums {
    RowSums(std::size_t heads, std::size_t stride)
        : stride(stride), lse(heads * stride, true), delta(heads * stride, true) {}

    GPO_AVX512 void fill(const TreeAttentionInputs& in, const bf16* out, const float* forward_lse,
                         const HeadsView& grad_out, std::size_t head, std::size_t first) {
        const std::size_t tokens = in.tokens, dim = in.dim;
        for (std::size_t i = first; i < std::min(first + kColumns, tokens); ++i) {
            const bf16* grad = grad_out.data + i * grad_out.token_stride + head * grad_out.head_stride;
            const bf16* row = out + (i * in.heads + head) * dim;
            __m512 sum = _mm512_setzero_ps();
            for (std::size_t d = 0; d < dim; d += 32)
                sum =
                    _mm512_dpbf16_ps(sum, as_bf16(_mm512_loadu_si512(grad + d)), as_bf16(_mm512_loadu_si512(row + d)));
            delta.get()[head * stride + i] = _mm512_reduce_add_ps(sum);
            lse.get()[head * stride + i] = forward_lse[head * tokens + i];
        }
    }

    std::size_t stride;
    Buffer<float> lse, delta;
};

// ds of 32 queries and 64 keys, without the scale.
template <bool kMasked>
GPO_AVX512 void query_weights(const Visibility& visibility, std::size_t query, std::size_t key, float scale,
                              const float* lse, const float* delta, Scratch& scratch) {
    for (std::size_t r = 0; r < kRows; ++r) {
        const __m512 origin = _mm512_set1_ps(lse[r]), mean = _mm512_set1_ps(delta[r]);
#pragma GCC unroll 4
        for (std::size_t j = 0; j < kColumns; j += 16) {
            const std::size_t at = r * kColumns + j;
            const __m512 z = _mm512_loadu_ps(scratch.product[0] + at);
            __m512 p = exp_or_zero(_mm512_fmsub_ps(z, _mm512_set1_ps(scale), origin));
            if (kMasked) p = _mm512_maskz_mov_ps(keys_seen(query + r, key + j, visibility.ends()), p);
            const __m512 dp = _mm512_sub_ps(_mm512_loadu_ps(scratch.product[1] + at), mean);
            store_bf16(scratch.weights[0] + at, _mm512_mul_ps(p, dp));
        }
    }
}

// p and ds, transposed, of 64 queries and 32 keys.
template <bool kMasked>
GPO_AVX512 void key_weights(const Visibility& visibility, std::size_t query, std::size_t key, float scale,
                            const float* lse, const float* delta, Scratch& scratch) {
    for (std::size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (std::size_t j = 0; j < kColumns; j += 16) {
            const std::size_t at = r * kColumns + j;
            const __m512 z = _mm512_loadu_ps(scratch.product[0] + at);
            __m512 p = exp_or_zero(_mm512_fmsub_ps(z, _mm512_set1_ps(scale), _mm512_loadu_ps(lse + j)));
            if (kMasked) p = _mm512_maskz_mov_ps(queries_seeing(query + j, key + r, visibility.ends()), p);
            const __m512 dp = _mm512_sub_ps(_mm512_loadu_ps(scratch.product[1] + at), _mm512_loadu_ps(delta + j));
            store_bf16(scratch.weights[0] + at, p);
            store_bf16(scratch.weights[1] + at, _mm512_mul_ps(p, dp));
        }
    }
}

GPO_AMX void backward_query_tile(const TreeAttentionInputs& in, const Visibility& visibility, const RightOperand& key,
                                 const RightOperand& value, const RowSums& rows, const HeadsView& grad_out,
                                 std::size_t head, std::size_t query, Scratch& scratch, bf16* grad_query) {
    const std::size_t dim = in.dim, tokens = in.tokens, kv_head = head / (in.heads / in.kv_heads);
    const std::size_t at = head * rows.stride + query;
    std::memset(scratch.sum[0], 0, kRows * dim * sizeof(float));
    load_rows(in.query, head, query, tokens, dim, scratch.left[0]);
    load_rows(grad_out, head, query, tokens, dim, scratch.left[1]);
    for (std::size_t first = 0; first < std::min(query + kRows, tokens); first += kColumns) {
        const Seen seen = visibility.seen(query, query + kRows, first, first + kColumns);
        if (seen == Seen::kNone) continue;
        key.multiply_over_dim(scratch.left[0], kv_head, first, scratch.product[0]);
        value.multiply_over_dim(scratch.left[1], kv_head, first, scratch.product[1]);
        const auto weigh = seen == Seen::kAll ? query_weights<false> : query_weights<true>;
        weigh(visibility, query, first, in.scale, rows.lse.get() + at, rows.delta.get() + at, scratch);
        key.add_over_tokens(scratch.weights[0], kv_head, first, scratch.sum[0]);
    }
    store_rows(scratch.sum[0], head, in.heads, query, tokens, dim, in.scale, grad_query);
}

GPO_AMX void backward_key_tile(const TreeAttentionInputs& in, const Visibility& visibility, const RightOperand& query,
                               const RightOperand& grad_out, const RowSums& rows, std::size_t kv_head, std::size_t key,
                               Scratch& scratch, bf16* grad_key, bf16* grad_value) {
    const std::size_t dim = in.dim, tokens = in.tokens, group = in.heads / in.kv_heads;
    for (float* sum : scratch.sum) std::memset(sum, 0, kRows * dim * sizeof(float));
    load_rows(in.key, kv_head, key, tokens, dim, scratch.left[0]);
    load_rows(in.value, kv_head, key, tokens, dim, scratch.left[1]);
    for (std::size_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        for (std::size_t first = key / kColumns * kColumns; first < tokens; first += kColumns) {
            const Seen seen = visibility.seen(first, first + kColumns, key, key + kRows);
            if (seen == Seen::kNone) continue;
            const std::size_t at = head * rows.stride + first;
            query.multiply_over_dim(scratch.left[0], head, first, scratch.product[0]);
            grad_out.multiply_over_dim(scratch.left[1], head, first, scratch.product[1]);
            const auto weigh = seen == Seen::kAll ? key_weights<false> : key_weights<true>;
            weigh(visibility, first, key, in.scale, rows.lse.get() + at, rows.delta.get() + at, scratch);
            grad_out.add_over_tokens(scratch.weights[0], head, first, scratch.sum[0]);
            query.add_over_tokens(scratch.weights[1], head, first, scratch.sum[1]);
        }
    }
    store_rows(scratch.sum[0], kv_head, in.kv_heads, key, tokens, dim, 1.0f, grad_value);
    store_rows(scratch.sum[1], kv_head, in.kv_heads, key, tokens, dim, in.scale, grad_key);
}

}  // namespace

void tree_attention_forward(const TreeAttentionInputs& in, bf16* out, float* lse, int threads) {
    if (!tree_attention_supported(in.dim)) throw std::runtime_error("tree attention in C++ needs AMX");
    const std::size_t tiles = tiles_of(in.tokens, kRows);
    const Visibility visibility(in.subtree_end, in.tokens);
    RightOperand key(in.tokens, in.kv_heads, in.dim), value(in.tokens, in.kv_heads, in.dim);
    for_each_task(in.kv_heads * key.tiles, threads, [&](std::size_t task, Scratch&) {
        key.pack(in.key, task / key.tiles, task % key.tiles);
        value.pack(in.value, task / key.tiles, task % key.tiles);
    });
    for_each_task(in.heads * tiles, threads, [&](std::size_t task, Scratch& scratch) {
        const std::size_t last_first = tiles - 1 - task % tiles;  // long tasks come first
        forward_tile(in, visibility, key, value, task / tiles, last_first * kRows, scratch, out, lse);
    });
}

void tree_attention_backward(const TreeAttentionInputs& in, const bf16* out, const float* lse,
                             const HeadsView& grad_out, bf16* grad_query, bf16* grad_key, bf16* grad_value,
                             int threads) {
    if (!tree_attention_supported(in.dim)) throw std::runtime_error("tree attention in C++ needs AMX");
    const std::size_t tiles = tiles_of(in.tokens, kRows);
    const Visibility visibility(in.subtree_end, in.tokens);
    RightOperand key(in.tokens, in.kv_heads, in.dim), value(in.tokens, in.kv_heads, in.dim);
    RightOperand query(in.tokens, in.heads, in.dim), grad(in.tokens, in.heads, in.dim);
    RowSums rows(in.heads, query.tiles * kColumns);
    for_each_task((in.heads + in.kv_heads) * query.tiles, threads, [&](std::size_t task, Scratch&) {
        const std::size_t head = task / query.tiles, tile = task % query.tiles;
        if (head < static_cast<std::size_t>(in.heads)) {
            query.pack(in.query, head, tile);
            grad.pack(grad_out, head, tile);
            rows.fill(in, out, lse, grad_out, head, tile * kColumns);
        } else {
            key.pack(in.key, head - in.heads, tile);
            value.pack(in.value, head - in.heads, tile);
        }
    });
    const std::size_t key_tasks = in.kv_heads * tiles, query_tasks = in.heads * tiles;
    for_each_task(key_tasks + query_tasks, threads, [&](std::size_t task, Scratch& scratch) {
        if (task < key_tasks) {
            backward_key_tile(in, visibility, query, grad, rows, task / tiles, task % tiles * kRows, scratch, grad_key,
                              grad_value);
        } else {
            const std::size_t place = task - key_tasks, last_first = tiles - 1 - place % tiles;
            backward_query_tile(in, visibility, key, value, rows, grad_out, place / tiles, last_first * kRows, scratch,
                                grad_query);
        }
    });
}

#else

void tree_attention_forward(const TreeAttentionInputs&, bf16*, float*, int) {
    throw std::runtime_error("tree attention in C++ needs AMX");
}

void tree_attention_backward(const TreeAttentionInputs&, const bf16*, const float*, const HeadsView&, bf16*, bf16*,
                             bf16*, int) {
    throw std::runtime_error("tree attention in C++ needs AMX");
}

#endif  // GPO_HAS_AMX

}  // namespace gpo_fast::cpu
