#include "cpu/paged_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

// One copy of the loops for each instruction set; the loader picks the best that the machine runs.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define GPO_FAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define GPO_FAST_CLONES
#endif

namespace gpo_fast {

namespace {

constexpr int kLanes = 16;

inline __attribute__((always_inline)) float widen(float x) { return x; }
inline __attribute__((always_inline)) float widen(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

inline void narrow(float x, float* out) { *out = x; }
inline void narrow(float x, uint16_t* out) {  // round to nearest even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    *out = std::isnan(x) ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <typename T>
inline __attribute__((always_inline)) float dot(const float* __restrict a, const T* __restrict b, int count) {
    float lanes[kLanes] = {};
    int d = 0;
    for (; d + kLanes <= count; d += kLanes) {
        for (int l = 0; l < kLanes; ++l) lanes[l] += a[d + l] * widen(b[d + l]);
    }
    float sum = 0;
    for (int l = 0; l < kLanes; ++l) sum += lanes[l];
    for (; d < count; ++d) sum += a[d] * widen(b[d]);
    return sum;
}

// All query heads of one row that share a KV head: scores first, then the weighted sum of the values.
template <typename T>
inline __attribute__((always_inline)) void attend_group(const PagedAttention& job, int64_t row, int group, float* query,
                                                        float* scores, float* sums) {
    const int dim = job.head_dim, heads = job.num_heads / job.num_kv_heads, length = job.lengths[row];
    const int64_t slot_stride = static_cast<int64_t>(job.num_kv_heads) * dim;
    const int64_t first = (row * job.num_heads + static_cast<int64_t>(group) * heads) * dim;
    const T* q = static_cast<const T*>(job.query) + first;
    const T* keys = static_cast<const T*>(job.keys) + static_cast<int64_t>(group) * dim;
    const T* values = static_cast<const T*>(job.values) + static_cast<int64_t>(group) * dim;
    const int32_t* table = job.tables + row * job.table_width;
    for (int d = 0; d < heads * dim; ++d) query[d] = widen(q[d]) * job.scale;

    for (int start = 0; start < length; start += job.block_size) {
        const T* key = keys + static_cast<int64_t>(table[start / job.block_size]) * job.block_size * slot_stride;
        const int stop = std::min(length, start + job.block_size);
        for (int t = start; t < stop; ++t, key += slot_stride) {
            for (int h = 0; h < heads; ++h) scores[h * length + t] = dot(query + h * dim, key, dim);
        }
    }
    for (int h = 0; h < heads; ++h) {
        float* score = scores + h * length;
        if (job.softcap > 0) {
            for (int t = 0; t < length; ++t) score[t] = job.softcap * std::tanh(score[t] / job.softcap);
        }
        float highest = -std::numeric_limits<float>::infinity(), total = 0;
        for (int t = 0; t < length; ++t) highest = std::max(highest, score[t]);
        for (int t = 0; t < length; ++t) total += score[t] = std::exp(score[t] - highest);
        for (int t = 0; t < length; ++t) score[t] /= total;
    }
    std::memset(sums, 0, static_cast<size_t>(heads) * static_cast<size_t>(dim) * sizeof(float));
    for (int start = 0; start < length; start += job.block_size) {
        const T* value = values + static_cast<int64_t>(table[start / job.block_size]) * job.block_size * slot_stride;
        const int stop = std::min(length, start + job.block_size);
        for (int t = start; t < stop; ++t, value += slot_stride) {
            for (int h = 0; h < heads; ++h) {
                const float weight = scores[h * length + t];
                float* sum = sums + h * dim;
                for (int d = 0; d < dim; ++d) sum[d] += weight * widen(value[d]);
            }
        }
    }
    T* out = static_cast<T*>(job.output) + first;
    for (int d = 0; d < heads * dim; ++d) narrow(sums[d], out + d);
}

GPO_FAST_CLONES void attend_float(const PagedAttention& job, int64_t row, int group, float* query, float* scores,
                                  float* sums) {
    attend_group<float>(job, row, group, query, scores, sums);
}

GPO_FAST_CLONES void attend_bfloat16(const PagedAttention& job, int64_t row, int group, float* query, float* scores,
                                     float* sums) {
    attend_group<uint16_t>(job, row, group, query, scores, sums);
}

}  // namespace

void paged_attention(const PagedAttention& job, bool is_bfloat16, int threads) {
    const int heads = job.num_heads / job.num_kv_heads;
    int32_t longest = 1;
    for (int64_t row = 0; row < job.rows; ++row) longest = std::max(longest, job.lengths[row]);
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        std::vector<float> query(heads * job.head_dim), sums(heads * job.head_dim);
        std::vector<float> scores(static_cast<size_t>(heads) * longest);
        for (int64_t row; (row = next.fetch_add(1)) < job.rows;) {
            for (int group = 0; group < job.num_kv_heads; ++group) {
                (is_bfloat16 ? attend_bfloat16 : attend_float)(job, row, group, query.data(), scores.data(),
                                                               sums.data());
            }
        }
    };
    std::vector<std::thread> helpers;
    for (int i = 1; i < std::min<int64_t>(threads, job.rows); ++i) helpers.emplace_back(work);
    work();
    for (auto& helper : helpers) helper.join();
}

}  // namespace gpo_fast
