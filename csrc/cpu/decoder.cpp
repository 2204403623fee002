#include "cpu/decoder.h"

#include <algorithm>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"

namespace gpo_fast::cpu {

namespace {

constexpr int64_t kMostRows = 192;     // rows of a task: their left operand stays in the second cache ...
constexpr int64_t kMostWideRows = 96;  // ... also where it is float32
constexpr int64_t kBlockRows = 128;    // rows that a thread takes from one attention to the next
constexpr int64_t kTileRows = 16;      // a multiple of what kernels take together, or nearly so

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t num_panels(int64_t outputs) { return ceil_div(outputs, kPanelColumns); }

// The width of rows in memory: an odd number of cache lines, of `line` values each. Rows an even number apart would lie
// in few sets of a cache.
int64_t odd_lines(int64_t width, int64_t line) { return (ceil_div(width, line) | 1) * line; }

// A product as tasks of one panel and a block of rows. Where a block holds all rows, one thread reads a panel from
// memory for all of them; the panels left over when the threads have had equally many are cut, a block for each thread.
struct ProductTasks {
    int64_t rows, block, blocks, whole, cut, cut_block, cut_blocks;

    ProductTasks(int64_t num_rows, int64_t panels, int64_t most_rows, int threads)
        : rows(num_rows), block(std::min(num_rows, most_rows)), blocks(ceil_div(num_rows, block)) {
        cut = blocks == 1 && rows > kTileRows ? panels % threads : 0;
        whole = panels - cut;
        cut_block = ceil_div(ceil_div(rows, threads), kTileRows) * kTileRows;
        cut_blocks = ceil_div(rows, cut_block);
    }
    int64_t count() const { return whole * blocks + cut * cut_blocks; }
    // work(first row, rows, panel)
    template <typename Work>
    void run(int64_t task, const Work& work) const {
        const bool is_whole = task < whole * blocks;
        const int64_t size = is_whole ? block : cut_block, number = is_whole ? blocks : cut_blocks;
        const int64_t within = is_whole ? task : task - whole * blocks;
        const int64_t row = within % number * size;
        work(row, std::min(size, rows - row), (is_whole ? 0 : whole) + within / number);
    }
};

}  // namespace

void pack_panels(const void* weight, int64_t outputs, int64_t inputs, bool is_bfloat16, void* panels, int threads) {
    const int64_t words = is_bfloat16 ? inputs / 2 : inputs, columns = is_bfloat16 ? kStripColumns : kPanelColumns;
    Tasks tasks;
    run_parallel(threads, [&](int) {
        int64_t strip;
        while (tasks.take(num_panels(outputs) * kPanelColumns / columns, strip)) {
            const int64_t first = strip * columns, rows = std::clamp<int64_t>(outputs - first, 0, columns);
            const uint32_t* from = static_cast<const uint32_t*>(weight) + first * words;
            uint32_t* to = static_cast<uint32_t*>(panels) + first * words;
            if (rows < columns) std::fill_n(to, words * columns, 0u);
            kernels().pack_strip(from, rows, words, columns, to);
        }
    });
}

void Decoder::Rows::shape(int64_t rows, int64_t width, bool is_narrow) {
    stride = odd_lines(width, is_narrow ? 32 : 16);
    values.resize(is_narrow ? 0 : rows * stride);
    narrow.resize(is_narrow ? rows * stride : 0);
}

void Decoder::Rows::put(int64_t i, int64_t first, int64_t count, const float* from) {
    if (narrow.empty()) {
        std::memcpy(values.data() + i * stride + first, from, count * sizeof(float));
    } else {
        kernels().narrow(from, count, narrow.data() + i * stride + first);
    }
}

// out [rows, 64], a row `stride` after the one before: rows of the left operand times one panel.
void Decoder::tile(const PackedLinear& linear, Rows& left, int64_t panel, int64_t row, int64_t rows, float* out,
                   int64_t stride) const {
    const int64_t depth = linear.inputs, elements = panel * depth * kPanelColumns;
    const float* values = left.narrow.empty() ? left.values.data() + row * left.stride : nullptr;
    if (is_bfloat16_) {
        kernels().multiply_panel(values, values ? nullptr : left.narrow.data() + row * left.stride, left.stride, rows,
                                 static_cast<const uint16_t*>(linear.panels) + elements, depth, out, stride);
    } else {
        kernels().multiply(values, left.stride, rows, static_cast<const float*>(linear.panels) + elements,
                           kPanelColumns, depth, kPanelColumns, out, stride, false);
    }
    if (!linear.bias) return;
    const int64_t first = panel * kPanelColumns, count = std::min<int64_t>(kPanelColumns, linear.outputs - first);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < count; ++j) out[i * stride + j] += linear.bias[first + j];
}

void Decoder::norm_row(const float* x, const float* weight, int64_t row, float* scratch) {
    kernels().rms_norm(x, weight, width_, epsilon_, is_bfloat16_, scratch);
    normed_.put(row, 0, width_, scratch);
}

// In the row's q, k, v: norms and rotary positions; keys and values into the pool.
void Decoder::project_heads(const DecoderLayer& layer, const DecoderBatch& batch, const AttentionShape& shape,
                            int64_t row) {
    const int64_t dim = shape.head_dim, heads = shape.num_heads, kv_heads = shape.num_kv_heads;
    float* q = qkv_.data() + row * qkv_stride_;
    float* k = q + heads * dim;
    const float* v = k + kv_heads * dim;
    if (is_bfloat16_) kernels().round_values(q, layer.qkv.outputs);
    for (int64_t h = 0; h < heads + kv_heads; ++h) {
        float* head = q + h * dim;
        const float* norm = h < heads ? layer.query_norm : layer.key_norm;
        if (norm) kernels().rms_norm(head, norm, dim, epsilon_, is_bfloat16_, head);
        kernels().rotate(head, batch.cos + row * dim, batch.sin + row * dim, dim, is_bfloat16_);
    }
    const int64_t count = kv_heads * dim, slot = batch.slots[row] * count;
    if (is_bfloat16_) {
        kernels().narrow(k, count, static_cast<uint16_t*>(layer.keys) + slot);
        kernels().narrow(v, count, static_cast<uint16_t*>(layer.values) + slot);
    } else {
        std::memcpy(static_cast<float*>(layer.keys) + slot, k, count * sizeof(float));
        std::memcpy(static_cast<float*>(layer.values) + slot, v, count * sizeof(float));
    }
}

void Decoder::forward(const DecoderBatch& batch, AttentionPlan& plan, int threads) {
    const AttentionShape& shape = plan.shape();
    const bool narrow = is_bfloat16_ && kernels().needs_narrow;
    const int64_t rows = batch.rows, heads_width = static_cast<int64_t>(shape.num_heads) * shape.head_dim;
    const int64_t qkv_width = layers_[0].qkv.outputs, inner = layers_[0].gate.outputs;
    normed_.shape(std::max(rows, batch.num_selected), width_, narrow);
    attended_.shape(rows, heads_width, narrow);
    activated_.shape(rows, inner, narrow);
    qkv_stride_ = odd_lines(num_panels(qkv_width) * kPanelColumns, 16);
    qkv_.resize(rows * qkv_stride_);

    // Blocks of rows for all threads alike, or none.
    const int64_t blocks = ceil_div(ceil_div(rows, kBlockRows), threads) * threads;
    const int64_t block = ceil_div(ceil_div(rows, blocks), kTileRows) * kTileRows;
    const bool in_blocks = rows >= threads * kBlockRows;
    const AttentionPlan::TaskSizes pieces = plan.tasks_for(threads);

    Barrier barrier(threads);
    Tasks tasks[2];  // of this phase and of the next
    run_parallel(threads, [&](int thread) {
        const KernelScope scope;
        std::vector<float> first(kMostRows * kPanelColumns), second(kMostRows * kPanelColumns);
        std::vector<float> whole_row(std::max(width_, heads_width));
        int phase = 0;
        // All of `count` tasks, then wait for the other threads.
        const auto together = [&](int64_t count, const auto& work) {
            int64_t task;
            while (tasks[phase % 2].take(count, task)) work(task);
            if (thread == 0) tasks[(phase + 1) % 2].reset();
            barrier.wait();
            ++phase;
        };
        const auto alone = [](int64_t count, const auto& work) {
            for (int64_t task = 0; task < count; ++task) work(task);
        };
        // work(row, rows, panel) for every block of the rows [start, start + count) and every panel of a weight.
        const auto each_tile = [&](const auto& each, int64_t start, int64_t count, int64_t outputs, const auto& work) {
            const ProductTasks product(count, num_panels(outputs), narrow ? kMostRows : kMostWideRows, threads);
            each(product.count(), [&](int64_t task) {
                product.run(task, [&](int64_t row, int64_t size, int64_t panel) { work(start + row, size, panel); });
            });
        };
        // x += left W, the product rounded first.
        const auto add_product = [&](const auto& each, int64_t start, int64_t count, const PackedLinear& linear,
                                     Rows& left) {
            each_tile(each, start, count, linear.outputs, [&](int64_t row, int64_t size, int64_t panel) {
                tile(linear, left, panel, row, size, first.data(), kPanelColumns);
                const int64_t column = panel * kPanelColumns;
                const int64_t columns = std::min<int64_t>(kPanelColumns, linear.outputs - column);
                for (int64_t i = 0; i < size; ++i)
                    kernels().add(batch.x + (row + i) * width_ + column, first.data() + i * kPanelColumns, columns,
                                  is_bfloat16_);
            });
        };
        const auto before_attention = [&](const auto& each, int64_t start, int64_t count, const DecoderLayer& layer) {
            each(count, [&](int64_t i) {
                norm_row(batch.x + (start + i) * width_, layer.input_norm, start + i, whole_row.data());
            });
            each_tile(each, start, count, qkv_width, [&](int64_t row, int64_t size, int64_t panel) {
                tile(layer.qkv, normed_, panel, row, size, qkv_.data() + row * qkv_stride_ + panel * kPanelColumns,
                     qkv_stride_);
            });
            each(count, [&](int64_t i) { project_heads(layer, batch, shape, start + i); });
        };
        const auto after_attention = [&](const auto& each, int64_t start, int64_t count, const DecoderLayer& layer) {
            each(count, [&](int64_t i) {
                plan.merge(start + i, whole_row.data());
                if (is_bfloat16_) kernels().round_values(whole_row.data(), heads_width);
                attended_.put(start + i, 0, heads_width, whole_row.data());
            });
            add_product(each, start, count, layer.output, attended_);
            each(count, [&](int64_t i) {
                norm_row(batch.x + (start + i) * width_, layer.attention_norm, start + i, whole_row.data());
            });
            each_tile(each, start, count, inner, [&](int64_t row, int64_t size, int64_t panel) {
                tile(layer.gate, normed_, panel, row, size, first.data(), kPanelColumns);
                tile(layer.up, normed_, panel, row, size, second.data(), kPanelColumns);
                const int64_t column = panel * kPanelColumns;
                const int64_t columns = std::min<int64_t>(kPanelColumns, inner - column);
                for (int64_t i = 0; i < size; ++i) {
                    float* gate = first.data() + i * kPanelColumns;
                    kernels().silu_times(gate, second.data() + i * kPanelColumns, columns, is_bfloat16_, gate);
                    activated_.put(row + i, column, columns, gate);
                }
            });
            add_product(each, start, count, layer.down, activated_);
        };
        // work(each, first row, rows): once with all threads, or for each block with one of them.
        const auto on_rows = [&](const auto& work) {
            if (!in_blocks) return work(together, 0, rows);
            together(ceil_div(rows, block),
                     [&](int64_t b) { work(alone, b * block, std::min(block, rows - b * block)); });
        };
        for (const DecoderLayer& layer : layers_) {
            on_rows(
                [&](const auto& each, int64_t start, int64_t count) { before_attention(each, start, count, layer); });
            together(pieces.count, [&](int64_t task) {
                plan.attend(task, pieces, qkv_.data(), qkv_stride_, layer.keys, layer.values);
            });
            on_rows(
                [&](const auto& each, int64_t start, int64_t count) { after_attention(each, start, count, layer); });
        }
        if (batch.num_selected == 0) return;
        together(batch.num_selected,
                 [&](int64_t i) { norm_row(batch.x + batch.selected[i] * width_, final_norm_, i, whole_row.data()); });
        each_tile(together, 0, batch.num_selected, head_.outputs, [&](int64_t row, int64_t count, int64_t panel) {
            tile(head_, normed_, panel, row, count, first.data(), kPanelColumns);
            const int64_t column = panel * kPanelColumns;
            const int64_t columns = std::min<int64_t>(kPanelColumns, head_.outputs - column);
            for (int64_t i = 0; i < count; ++i)
                std::memcpy(batch.logits + (row + i) * head_.outputs + column, first.data() + i * kPanelColumns,
                            columns * sizeof(float));
        });
    });
}

}  // namespace gpo_fast::cpu
