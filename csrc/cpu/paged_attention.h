// Attention of single query tokens over a paged KV pool on the CPU.
//
//   out[n, h] = sum_t softmax_t(scale * q[n, h] . K[slot(n, t), g]) V[slot(n, t), g],   t < lengths[n],  g = h / (H /
//   G)
//
// slot(n, t) = block_tables[n, t / block_size] * block_size + t % block_size. Reads q once and each visible key and
// value once per row; scores and sums are float32 whatever the storage type. Handles any head size; no sliding
// window, no bias; `softcap` > 0 squashes scores to softcap * tanh(score / softcap).
#pragma once

#include <cstdint>

namespace gpo_fast {

struct PagedAttention {
    const void* query;       // [rows, num_heads, head_dim]
    const void* keys;        // [num_slots, num_kv_heads, head_dim]
    const void* values;      // [num_slots, num_kv_heads, head_dim]
    void* output;            // [rows, num_heads, head_dim]
    const int32_t* tables;   // [rows, table_width]
    const int32_t* lengths;  // [rows], at least 1
    int64_t rows, table_width;
    int32_t num_heads, num_kv_heads, head_dim, block_size;
    float scale, softcap;
};

// `threads` threads share the rows. bfloat16 tensors if `is_bfloat16`, float32 otherwise.
void paged_attention(const PagedAttention& job, bool is_bfloat16, int threads);

}  // namespace gpo_fast
