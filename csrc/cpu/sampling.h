// Draws one token for each row of logits: temperature, top-k, top-p, min-p, and the token's logprobs.
//
// The token is the first whose cumulative weight, in the order of the vocabulary, exceeds uniform * total: the inverse
// of the cumulative distribution. Without top-k and top-p a row is read twice (maximum, sums of blocks) and one block
// of it a third time; nothing is sorted. Weights are float32, sums of them float64.
#pragma once

#include <cstdint>

namespace gpo_fast::cpu {

struct SamplingJob {
    const float* logits;  // [rows, vocabulary]
    int64_t rows, vocabulary;
    const float* temperature;   // [rows]; 0: greedy
    const int32_t* top_k;       // 0: off
    const float* top_p;         // 1: off
    const float* min_p;         // 0: off
    const double* uniform;      // in [0, 1)
    int64_t* tokens;            // [rows]
    double* logprobs;           // under temperature 1, without filters
    double* sampling_logprobs;  // under the distribution drawn from; 0 for greedy
};

void sample(const SamplingJob& job, int threads);

}  // namespace gpo_fast::cpu
