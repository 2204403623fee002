// Log-probabilities of a linear head over bfloat16 inputs on a CPU, without a logit ever leaving the cache.
//
// For every row x of N: z_v = f(x . W_v + b_v) with the soft-cap and the temperature in f, in float32. One
// pass over the vocabulary gives, per row, the log-sum-exp, the entropy and the logits of the row's targets,
// and on request the two sums that a frozen head needs for its backward pass (see gpo_fast/losses/chunked.py
// for their definition). What is rounded to bfloat16: the inputs of the second matrix product, exp(z - max),
// to a relative 2^-9 each.
#pragma once

#include <cstdint>
#include <string>

namespace gpo_fast::cpu {

using bf16 = std::uint16_t;

// The head and the rows. Matrices are dense and row-major. Entry k asks for the logit of vocabulary entry
// targets[k] in row target_rows[k]; target_rows ascends. A target outside [0, vocab) has the logit -inf.
struct LogprobInputs {
    const bf16* hidden = nullptr;  // (rows, width)
    const bf16* weight = nullptr;  // (vocab, width)
    const float* bias = nullptr;   // (vocab) or null
    const std::int64_t* targets = nullptr;
    const std::int64_t* target_rows = nullptr;
    std::int64_t rows = 0;
    std::int64_t vocab = 0;
    std::int64_t width = 0;
    std::int64_t entries = 0;
    float temperature = 1.0f;
    float softcap = 0.0f;  // 0: none
};

struct ForwardOutputs {
    float* target_logits = nullptr;  // (entries)
    float* target_slopes = nullptr;  // (entries)  d z / d raw
    float* lse = nullptr;            // (rows)
    float* entropy = nullptr;        // (rows)
    bf16* expected = nullptr;        // (rows, width) or null: sum of p_v c_v W_v without the row's targets
    bf16* entropy_row = nullptr;     // (rows, width) or null; needs `expected`
};

struct BackwardInputs {
    const float* lse = nullptr;            // (rows)
    const float* entropy = nullptr;        // (rows)
    const float* row_grad = nullptr;       // (rows)  sum of grad_logprobs over the row's entries
    const float* grad_logprobs = nullptr;  // (entries)
    const float* grad_entropy = nullptr;   // (rows) or null
};

struct BackwardOutputs {
    bf16* hidden = nullptr;  // (rows, width) or null
    bf16* weight = nullptr;  // (vocab, width) or null
    float* bias = nullptr;   // (vocab) or null
};

// The instructions that the functions below use: "amx" (with BF16), "avx512" (with BF16), or "none" where this CPU has
// neither, and then they throw std::runtime_error.
const char* linear_logprob_kernels();

// Chooses others than the best, as tests do; throws std::invalid_argument where this CPU lacks them.
void use_linear_logprob_kernels(const std::string& name);

void linear_logprob_forward(const LogprobInputs& inputs, const ForwardOutputs& outputs, int threads);

// Recomputes the logits. Threads own ranges of the vocabulary, so the head's gradient is written once and
// needs no reduction; the hidden states' gradient is summed over threads in their order.
void linear_logprob_backward(const LogprobInputs& inputs, const BackwardInputs& gradients,
                             const BackwardOutputs& outputs, int threads);

}  // namespace gpo_fast::cpu
