// Attention of bfloat16 over a packed forest by AMX, forward and backward, for training on a CPU.
//
// Key j is visible to query i exactly when j <= i < subtree_end[j]. With z_ij = scale q_i . k_j over those keys,
//
//     lse_i = log sum_j exp(z_ij)     p_ij = exp(z_ij - lse_i)     out_i = sum_j p_ij v_j
//     dv_j = sum_i p_ij do_i     ds_ij = p_ij (do_i . v_j - do_i . out_i)
//     dq_i = scale sum_j ds_ij k_j     dk_j = scale sum_i ds_ij q_i
//
// as flash attention does (arXiv 2205.14135, arXiv 2307.08691): tile by tile, z computed again in the backward
// pass, and tiles that no query sees left out. What is rounded to bfloat16: exp(z_ij - max), p and ds as operands
// of products, and the results. Sums are float32, in an order that does not depend on the number of threads.
#pragma once

#include <cstdint>

namespace gpo_fast::cpu {

using bf16 = std::uint16_t;

// A tensor (tokens, heads, dim) whose last dimension is dense; strides count elements.
struct HeadsView {
    const bf16* data = nullptr;
    std::int64_t token_stride = 0;
    std::int64_t head_stride = 0;
};

struct TreeAttentionInputs {
    HeadsView query;                            // (tokens, heads, dim)
    HeadsView key, value;                       // (tokens, kv_heads, dim)
    const std::int32_t* subtree_end = nullptr;  // (tokens), each greater than its index
    std::int64_t tokens = 0;
    std::int64_t heads = 0;  // a multiple of kv_heads
    std::int64_t kv_heads = 0;
    std::int64_t dim = 0;
    float scale = 1.0f;
};

// Whether this CPU has AMX with BF16 and heads of `dim` fit: a multiple of 32 up to 256. Elsewhere the functions below
// throw std::runtime_error.
bool tree_attention_supported(std::int64_t dim);

// Writes out (tokens, heads, dim) and lse (heads, tokens), both dense.
void tree_attention_forward(const TreeAttentionInputs& inputs, bf16* out, float* lse, int threads);

// Writes dq (tokens, heads, dim), dk and dv (tokens, kv_heads, dim), all dense, from what the forward pass wrote.
void tree_attention_backward(const TreeAttentionInputs& inputs, const bf16* out, const float* lse,
                             const HeadsView& grad_out, bf16* grad_query, bf16* grad_key, bf16* grad_value,
                             int threads);

}  // namespace gpo_fast::cpu
