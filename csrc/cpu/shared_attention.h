// Attention over paged keys that rows of queries share.
//
// The keys that the rows see are given as segments: a list of pages with rows that see its first `visible` keys. A
// row may be in many segments (the prompt, the trajectory so far, its own tail), disjoint in their keys; what it
// sees is their union. A segment's keys are read once for all its rows, as small matrix products in float32; the
// parts are merged by log-sum-exp:
//
//   m = max_i m_i,   out = sum_i exp(m_i - m) o_i / sum_i exp(m_i - m) t_i      (no keys at all: zero)
//
// with m_i the largest score, t_i the sum of exp(score - m_i) and o_i that of exp(score - m_i) v of part i.
// Decoding: groups and tails of a SharedPlan. Prefill: one segment for each sequence, row i seeing position + 1 keys.
#pragma once

#include <cstdint>
#include <vector>

namespace gpo_fast::cpu {

struct Segments {
    int64_t count;                // S
    const int32_t* page_offsets;  // [S + 1] into pages
    const int32_t* pages;
    const int32_t* row_offsets;  // [S + 1] into rows and visible
    const int32_t* rows;
    const int32_t* visible;
};

struct AttentionShape {
    int32_t num_heads, num_kv_heads, head_dim, block_size;
    float scale, softcap;
    bool is_bfloat16;  // of the pool
};

// The work of one step, the same for all layers: made once, run by the threads of a parallel region.
class AttentionPlan {
  public:
    AttentionPlan(const Segments& segments, int64_t num_rows, const AttentionShape& shape);

    // How the work of a layer is cut for a number of threads. A piece of many rows is a task for each KV head. Of a
    // piece of few rows a task takes KV heads that lie together, as many as leave enough tasks: memory is read in
    // longer stretches, and a thread knows what it reads next.
    struct TaskSizes {
        int64_t heads, groups;  // KV heads of a task, and tasks of a piece, where there are few rows
        int64_t count;
    };
    TaskSizes tasks_for(int threads) const;
    // query [rows, heads, head size], a row `stride` after the one before; keys and values [slots, kv heads, head
    // size] of one layer.
    void attend(int64_t task, const TaskSizes& sizes, const float* query, int64_t stride, const void* keys,
                const void* values);
    // After all tasks: out [heads, head size] of one row.
    void merge(int64_t row, float* out) const;

    int64_t num_rows() const { return num_rows_; }
    const AttentionShape& shape() const { return shape_; }

  private:
    struct Piece {  // of each KV head in turn
        int64_t first_row, rows, first_key, keys;
        const int32_t* pages;
        int64_t result;  // where its results start, for KV head 0
    };
    struct Part {  // one piece's share of one row
        int32_t piece, index;
    };
    void cut(int32_t first_row, int32_t stop_row, const int32_t* pages);
    bool has_few_rows(const Piece& piece) const;
    // `has_next`: this thread takes the next KV head of the piece after this one.
    void attend_head(const Piece& piece, int64_t group, bool has_next, const float* query, int64_t stride,
                     const void* keys, const void* values);
    int64_t result_size(const Piece& piece) const { return piece.rows * heads_ * (padded_ + 2); }

    const AttentionShape shape_;
    const int64_t num_rows_, heads_, padded_;  // heads_: query heads of a KV head
    std::vector<int32_t> pages_, rows_, visible_;
    std::vector<Piece> pieces_;          // those of many rows first
    int64_t num_large_ = 0;              // of many rows
    std::vector<int64_t> part_offsets_;  // [rows + 1]
    std::vector<Part> parts_;
    std::vector<float> results_;
};

// The whole of it for one layer: query and output [rows, heads, head size], of the pool's type.
void shared_attention(AttentionPlan& plan, const void* query, const void* keys, const void* values, void* output,
                      int threads);

}  // namespace gpo_fast::cpu
