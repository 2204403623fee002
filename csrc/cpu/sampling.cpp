#include "cpu/sampling.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"

namespace gpo_fast::cpu {

namespace {

struct Candidate {
    int64_t token;
    float weight;  // exp((logit - highest) / temperature)
};

struct Drawn {
    int64_t token;
    double total;  // of the weights drawn from
};

struct Row {
    const float* logits;
    int64_t vocabulary;
    float highest, inverse_temperature;
    double uniform;
};

double sum_all(const Row& row) {
    return kernels().sum_exp(row.logits, row.vocabulary, row.highest, row.inverse_temperature);
}

// No filter: sums of blocks, then the tokens of the block in which the target lies.
Drawn draw_unfiltered(const Row& row) {
    static thread_local std::vector<double> sums;
    const int64_t blocks = (row.vocabulary + kSumBlock - 1) / kSumBlock;
    sums.resize(blocks);
    const auto size = [&](int64_t block) { return std::min<int64_t>(kSumBlock, row.vocabulary - block * kSumBlock); };
    double total = 0;
    for (int64_t b = 0; b < blocks; ++b)
        total += sums[b] = kernels().sum_exp(row.logits + b * kSumBlock, size(b), row.highest, row.inverse_temperature);
    const double target = row.uniform * total;
    int64_t block = 0;
    double below = 0;
    while (block + 1 < blocks && below + sums[block] <= target) below += sums[block++];
    float weights[kSumBlock];
    const int64_t count = size(block);
    kernels().exp_into(row.logits + block * kSumBlock, count, row.highest, row.inverse_temperature, weights);
    int64_t last = 0;  // stays the choice if rounding keeps the sum below the target
    for (int64_t i = 0; i < count; ++i) {
        if (weights[i] >= weights[last]) last = i;
        below += weights[i];
        if (below > target) return {block * kSumBlock + i, total};
    }
    return {block * kSumBlock + last, total};
}

// Tokens whose logit is at least `floor`, in the order of the vocabulary.
void collect(const Row& row, float floor, std::vector<Candidate>& kept) {
    kept.clear();
    for (int64_t t = 0; t < row.vocabulary; ++t) {
        if (row.logits[t] >= floor) {
            kept.push_back({t, std::exp((row.logits[t] - row.highest) * row.inverse_temperature)});
        }
    }
}

double weight_of(const std::vector<Candidate>& kept) {
    double total = 0;
    for (const Candidate& c : kept) total += c.weight;
    return total;
}

// The k likeliest; of equal ones the first.
void keep_top_k(const Row& row, int64_t k, std::vector<Candidate>& kept) {
    static thread_local std::vector<float> ordered;
    ordered.assign(row.logits, row.logits + row.vocabulary);
    std::nth_element(ordered.begin(), ordered.begin() + (k - 1), ordered.end(), std::greater<float>());
    const float least = ordered[k - 1];
    collect(row, least, kept);
    int64_t surplus = static_cast<int64_t>(kept.size()) - k;
    for (size_t i = kept.size(); surplus > 0 && i-- > 0;) {
        if (row.logits[kept[i].token] == least) {
            kept.erase(kept.begin() + static_cast<int64_t>(i));
            --surplus;
        }
    }
}

// Enough of the likeliest tokens to hold `share` of the whole weight.
void collect_share(const Row& row, double share, std::vector<Candidate>& kept) {
    const double needed = share * sum_all(row) * (1 + 1e-5);
    for (const int depth : {8, 16, 32, 64}) {
        collect(row, row.highest - static_cast<float>(depth) / row.inverse_temperature, kept);
        if (weight_of(kept) >= needed) return;
    }
    collect(row, -INFINITY, kept);
}

// Drops each token before which, from the likeliest down, `top_p` of `total` has been reached.
void keep_top_p(double top_p, double total, std::vector<Candidate>& kept) {
    std::stable_sort(kept.begin(), kept.end(),
                     [](const Candidate& a, const Candidate& b) { return a.weight > b.weight; });
    double before = 0;
    size_t count = 0;
    while (count < kept.size() && (count == 0 || before < top_p * total)) before += kept[count++].weight;
    kept.resize(count);
    std::sort(kept.begin(), kept.end(), [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
}

Drawn draw_filtered(const Row& row, int64_t top_k, float top_p, float min_p) {
    static thread_local std::vector<Candidate> kept;
    const bool few = top_k > 0 && top_k < row.vocabulary;
    if (few) {
        keep_top_k(row, top_k, kept);
    } else if (top_p < 1) {
        collect_share(row, top_p, kept);
    } else {
        collect(row, row.highest + std::log(min_p) / row.inverse_temperature - 1e-3f, kept);
    }
    if (top_p < 1) keep_top_p(top_p, few ? weight_of(kept) : sum_all(row), kept);
    if (min_p > 0) {
        kept.erase(std::remove_if(kept.begin(), kept.end(), [&](const Candidate& c) { return c.weight < min_p; }),
                   kept.end());
    }
    const double total = weight_of(kept), target = row.uniform * total;
    double below = 0;
    for (const Candidate& c : kept) {
        below += c.weight;
        if (below > target) return {c.token, total};
    }
    return {kept.back().token, total};
}

void sample_row(const SamplingJob& job, int64_t i) {
    const float* logits = job.logits + i * job.vocabulary;
    const float temperature = job.temperature[i] > 0 ? job.temperature[i] : 1.0f;
    Row row{logits, job.vocabulary, kernels().largest(logits, job.vocabulary), 1 / temperature, job.uniform[i]};
    const bool greedy = job.temperature[i] == 0;
    const bool filtered = job.top_k[i] > 0 || job.top_p[i] < 1 || job.min_p[i] > 0;
    Drawn drawn{0, 0};
    if (greedy) {
        drawn.token = std::find(logits, logits + job.vocabulary, row.highest) - logits;
    } else if (filtered) {
        drawn = draw_filtered(row, job.top_k[i], job.top_p[i], job.min_p[i]);
    } else {
        drawn = draw_unfiltered(row);
    }
    const double above = static_cast<double>(logits[drawn.token]) - row.highest;
    const bool plain = !greedy && !filtered && temperature == 1;
    const double whole = plain ? drawn.total : kernels().sum_exp(logits, job.vocabulary, row.highest, 1.0f);
    job.tokens[i] = drawn.token;
    job.logprobs[i] = above - std::log(whole);
    job.sampling_logprobs[i] = greedy ? 0 : above / temperature - std::log(drawn.total);
}

}  // namespace

void sample(const SamplingJob& job, int threads) {
    Tasks rows;
    run_parallel(static_cast<int>(std::min<int64_t>(threads, job.rows)), [&](int) {
        int64_t row;
        while (rows.take(job.rows, row)) sample_row(job, row);
    });
}

}  // namespace gpo_fast::cpu
