#include "cpu/shared_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"

namespace gpo_fast::cpu {

namespace {

constexpr int64_t kQueryRows = 96;  // queries of a piece: their scores and sums stay in the second cache
constexpr int64_t kKeyRange = 512;  // keys of a piece: enough pieces for all threads where there are few rows
constexpr int64_t kTasks = 8;       // of few rows, for each thread: they end nearly together

}  // namespace

AttentionPlan::AttentionPlan(const Segments& segments, int64_t num_rows, const AttentionShape& shape)
    : shape_(shape),
      num_rows_(num_rows),
      heads_(shape.num_heads / shape.num_kv_heads),
      padded_((shape.head_dim + 15) / 16 * 16),
      pages_(segments.pages, segments.pages + segments.page_offsets[segments.count]),
      rows_(segments.rows, segments.rows + segments.row_offsets[segments.count]),
      visible_(segments.visible, segments.visible + segments.row_offsets[segments.count]) {
    for (int64_t s = 0; s < segments.count; ++s) {
        const int32_t first = segments.row_offsets[s], stop = segments.row_offsets[s + 1];
        const int64_t step = std::max<int64_t>(1, kQueryRows / heads_);
        for (int64_t row = first; row < stop; row += step)
            cut(static_cast<int32_t>(row), static_cast<int32_t>(std::min<int64_t>(stop, row + step)),
                pages_.data() + segments.page_offsets[s]);
    }
    // The largest pieces first, so that no thread is left with one at the end.
    const auto size = [this](const Piece& piece) {
        return std::make_pair(!has_few_rows(piece), piece.rows * piece.keys);
    };
    std::stable_sort(pieces_.begin(), pieces_.end(), [&](const Piece& a, const Piece& b) { return size(a) > size(b); });
    num_large_ = std::count_if(pieces_.begin(), pieces_.end(), [this](const Piece& p) { return !has_few_rows(p); });
    int64_t total = 0;
    std::vector<int64_t> parts_of(num_rows, 0);
    for (Piece& piece : pieces_) {
        piece.result = total;
        total += result_size(piece) * shape.num_kv_heads;
        for (int64_t i = 0; i < piece.rows; ++i) ++parts_of[rows_[piece.first_row + i]];
    }
    results_.resize(total);
    part_offsets_.assign(num_rows + 1, 0);
    for (int64_t row = 0; row < num_rows; ++row) part_offsets_[row + 1] = part_offsets_[row] + parts_of[row];
    parts_.resize(part_offsets_[num_rows]);
    std::vector<int64_t> next(part_offsets_.begin(), part_offsets_.end() - 1);
    for (size_t p = 0; p < pieces_.size(); ++p)
        for (int64_t i = 0; i < pieces_[p].rows; ++i)
            parts_[next[rows_[pieces_[p].first_row + i]]++] = {static_cast<int32_t>(p), static_cast<int32_t>(i)};
}

// Pieces of the rows [first_row, stop_row) of a segment: as many keys as the row that sees most, in ranges.
void AttentionPlan::cut(int32_t first_row, int32_t stop_row, const int32_t* pages) {
    const int64_t seen = *std::max_element(visible_.begin() + first_row, visible_.begin() + stop_row);
    for (int64_t key = 0; key < seen;) {
        const int64_t keys = std::min(kKeyRange, seen - key);
        pieces_.push_back({first_row, stop_row - first_row, key, keys, pages, 0});
        key += keys;
    }
}

bool AttentionPlan::has_few_rows(const Piece& piece) const { return piece.rows * heads_ <= kFewRows; }

AttentionPlan::TaskSizes AttentionPlan::tasks_for(int threads) const {
    const int64_t kv_heads = shape_.num_kv_heads, small = static_cast<int64_t>(pieces_.size()) - num_large_;
    const int64_t heads = std::clamp<int64_t>(small * kv_heads / (kTasks * threads), 1, kv_heads);
    const int64_t groups = (kv_heads + heads - 1) / heads;
    return {heads, groups, num_large_ * kv_heads + small * groups};
}

void AttentionPlan::attend(int64_t task, const TaskSizes& sizes, const float* query, int64_t stride, const void* keys,
                           const void* values) {
    const int64_t kv_heads = shape_.num_kv_heads, large = num_large_ * kv_heads;
    if (task < large) {
        return attend_head(pieces_[task / kv_heads], task % kv_heads, false, query, stride, keys, values);
    }
    const Piece& piece = pieces_[num_large_ + (task - large) / sizes.groups];
    const int64_t first = (task - large) % sizes.groups * sizes.heads, stop = std::min(kv_heads, first + sizes.heads);
    for (int64_t head = first; head < stop; ++head)
        attend_head(piece, head, head + 1 < stop, query, stride, keys, values);
}

void AttentionPlan::attend_head(const Piece& piece, int64_t group, bool has_next, const float* query, int64_t stride,
                                const void* keys, const void* values) {
    static thread_local std::vector<float> scratch;
    static thread_local std::vector<int32_t> visible;
    const int64_t rows = piece.rows * heads_;
    scratch.resize(rows * padded_ + attention_scratch(rows, padded_));
    visible.resize(rows);
    for (int64_t i = 0; i < piece.rows; ++i) {
        const float* from = query + rows_[piece.first_row + i] * stride + group * heads_ * shape_.head_dim;
        float* to = scratch.data() + i * heads_ * padded_;
        for (int64_t head = 0; head < heads_; ++head, from += shape_.head_dim, to += padded_) {
            std::memcpy(to, from, shape_.head_dim * sizeof(float));
            std::fill(to + shape_.head_dim, to + padded_, 0.0f);
        }
        std::fill_n(visible.begin() + i * heads_, heads_, visible_[piece.first_row + i]);
    }
    const int64_t head_size = shape_.head_dim * (shape_.is_bfloat16 ? 2 : 4), head_bytes = group * head_size;
    float* result = results_.data() + piece.result + group * result_size(piece);
    kernels().attend({scratch.data(),
                      visible.data(),
                      static_cast<const char*>(keys) + head_bytes,
                      static_cast<const char*>(values) + head_bytes,
                      has_next ? static_cast<const char*>(keys) + head_bytes + head_size : nullptr,
                      piece.pages,
                      result,
                      result + rows,
                      result + 2 * rows,
                      scratch.data() + rows * padded_,
                      static_cast<int64_t>(shape_.num_kv_heads) * shape_.head_dim,
                      static_cast<int32_t>(rows),
                      static_cast<int32_t>(piece.first_key),
                      static_cast<int32_t>(piece.keys),
                      shape_.block_size,
                      shape_.head_dim,
                      static_cast<int32_t>(padded_),
                      shape_.scale,
                      shape_.softcap,
                      shape_.is_bfloat16});
}

void AttentionPlan::merge(int64_t row, float* out) const {
    std::memset(out, 0, static_cast<size_t>(shape_.num_heads) * shape_.head_dim * sizeof(float));
    for (int64_t head = 0; head < shape_.num_heads; ++head, out += shape_.head_dim) {
        const int64_t group = head / heads_, within = head % heads_;
        const auto result = [&](const Part& part, int64_t& at) {
            const Piece& piece = pieces_[part.piece];
            at = part.index * heads_ + within;
            return results_.data() + piece.result + group * result_size(piece);
        };
        float highest = -std::numeric_limits<float>::infinity();
        int64_t at;
        for (int64_t p = part_offsets_[row]; p < part_offsets_[row + 1]; ++p)
            highest = std::max(highest, result(parts_[p], at)[at]);
        if (highest == -std::numeric_limits<float>::infinity()) continue;
        float total = 0;
        for (int64_t p = part_offsets_[row]; p < part_offsets_[row + 1]; ++p) {
            const int64_t rows = pieces_[parts_[p].piece].rows * heads_;
            const float* from = result(parts_[p], at);
            const float weight = std::exp(from[at] - highest);
            if (weight == 0) continue;
            total += weight * from[rows + at];
            const float* sum = from + 2 * rows + at * padded_;
            for (int64_t d = 0; d < shape_.head_dim; ++d) out[d] += weight * sum[d];
        }
        for (int64_t d = 0; d < shape_.head_dim; ++d) out[d] /= total;
    }
}

void shared_attention(AttentionPlan& plan, const void* query, const void* keys, const void* values, void* output,
                      int threads) {
    const AttentionShape& shape = plan.shape();
    const int64_t width = static_cast<int64_t>(shape.num_heads) * shape.head_dim;
    std::vector<float> wide(shape.is_bfloat16 ? plan.num_rows() * width : 0);
    const float* queries = shape.is_bfloat16 ? wide.data() : static_cast<const float*>(query);
    Barrier barrier(threads);
    Tasks widen_rows, pieces, merge_rows;
    const AttentionPlan::TaskSizes sizes = plan.tasks_for(threads);
    run_parallel(threads, [&](int) {
        const KernelScope scope;
        std::vector<float> row_values(width);
        int64_t task;
        while (shape.is_bfloat16 && widen_rows.take(plan.num_rows(), task))
            kernels().widen(static_cast<const uint16_t*>(query) + task * width, width, wide.data() + task * width);
        barrier.wait();
        while (pieces.take(sizes.count, task)) plan.attend(task, sizes, queries, width, keys, values);
        barrier.wait();
        while (merge_rows.take(plan.num_rows(), task)) {
            if (shape.is_bfloat16) {
                plan.merge(task, row_values.data());
                kernels().narrow(row_values.data(), width, static_cast<uint16_t*>(output) + task * width);
            } else {
                plan.merge(task, static_cast<float*>(output) + task * width);
            }
        }
    });
}

}  // namespace gpo_fast::cpu
