// The forward pass of a Llama-like decoder (Llama, Qwen2, Qwen3, Mistral) over one packed row of tokens.
//
//   h = norm(x) W_qkv (+ b);  q, k = rotate(head norm of q and k where there is one);  K, V to their slots
//   x += attention(q) W_o;    x += (silu(norm(x) W_gate) * norm(x) W_up) W_down;    logits = norm(x) W_head
//
// A whole pass is one parallel region. Of few rows every phase is shared by the threads and ends with a barrier: a
// weight is read from memory by one thread, for all rows. Many rows are cut into blocks; a thread takes a block from
// one attention to the next, so that its activations stay in that core's cache. In a bfloat16 model, values are rounded
// where transformers' modules round, except that the logits stay float32.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/shared_attention.h"

namespace gpo_fast::cpu {

// A weight in panels of 64 outputs (see kernels.h); the memory is the caller's.
struct PackedLinear {
    const void* panels = nullptr;
    const float* bias = nullptr;  // [outputs] or null
    int64_t inputs = 0, outputs = 0;
};

// weight [outputs, inputs], float32 or bfloat16, in panels (see kernels.h). What is missing of the last panel is zero.
void pack_panels(const void* weight, int64_t outputs, int64_t inputs, bool is_bfloat16, void* panels, int threads);

struct DecoderLayer {
    const float* input_norm;      // [width]
    const float* attention_norm;  // [width], before the feed-forward block
    const float* query_norm;      // [head size] or null
    const float* key_norm;
    PackedLinear qkv, output, gate, up, down;
    void* keys;  // this layer's pool: [slots, kv heads, head size]
    void* values;
};

struct DecoderBatch {
    float* x;              // [rows, width]: the embeddings; overwritten
    const float* cos;      // [rows, head size]
    const float* sin;      // [rows, head size]
    const int64_t* slots;  // [rows]: where each row's key and value go
    int64_t rows;
    const int32_t* selected;  // [num_selected]: rows whose logits are wanted
    int64_t num_selected;
    float* logits;  // [num_selected, vocabulary]
};

class Decoder {
  public:
    Decoder(int64_t width, float norm_epsilon, bool is_bfloat16)
        : width_(width), epsilon_(norm_epsilon), is_bfloat16_(is_bfloat16) {}

    void add_layer(const DecoderLayer& layer) { layers_.push_back(layer); }
    void set_head(const float* final_norm, const PackedLinear& head) {
        final_norm_ = final_norm;
        head_ = head;
    }
    void forward(const DecoderBatch& batch, AttentionPlan& plan, int threads);
    int64_t vocabulary() const { return head_.outputs; }

  private:
    // A left operand: bfloat16 where the kernels want it so, else float32.
    struct Rows {
        std::vector<float> values;
        std::vector<uint16_t> narrow;
        int64_t stride = 0;  // from a row to the next
        void shape(int64_t rows, int64_t width, bool is_narrow);
        // Columns [first, first + count) of row i.
        void put(int64_t i, int64_t first, int64_t count, const float* from);
    };
    void norm_row(const float* x, const float* weight, int64_t row, float* scratch);
    void project_heads(const DecoderLayer& layer, const DecoderBatch& batch, const AttentionShape& shape, int64_t row);
    void tile(const PackedLinear& linear, Rows& left, int64_t panel, int64_t row, int64_t rows, float* out,
              int64_t stride) const;

    const int64_t width_;
    const float epsilon_;
    const bool is_bfloat16_;
    std::vector<DecoderLayer> layers_;
    const float* final_norm_ = nullptr;
    PackedLinear head_;
    Rows normed_, attended_, activated_;
    std::vector<float> qkv_;
    int64_t qkv_stride_ = 0;
};

}  // namespace gpo_fast::cpu
