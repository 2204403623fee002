#include "cpu/linear_logprob.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns about its own `_mm512_undefined_ps` wherever it inlines the intrinsics that use it.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/amx.h"
#include "cpu/buffer.h"
#include "cpu/linear_logprob_gemm.h"

namespace gpo_fast::cpu {

namespace {

enum class Instructions { kNone, kAvx512, kAmx };

bool has_avx512() noexcept {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

Instructions in_use = amx_supported() ? Instructions::kAmx : has_avx512() ? Instructions::kAvx512 : Instructions::kNone;

}  // namespace

const char* linear_logprob_kernels() {
    return in_use == Instructions::kAmx ? "amx" : in_use == Instructions::kAvx512 ? "avx512" : "none";
}

void use_linear_logprob_kernels(const std::string& name) {
    if (name == "none") {
        in_use = Instructions::kNone;
    } else if (name == "avx512" && has_avx512()) {
        in_use = Instructions::kAvx512;
    } else if (name == "amx" && amx_supported()) {
        in_use = Instructions::kAmx;
    } else {
        throw std::invalid_argument("kernels must be 'amx', 'avx512' or 'none' and run on this machine, got '" + name +
                                    "'");
    }
}

#if defined(__x86_64__)

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::size_t kVocab = 192;        // columns of a chunk: its two packed weights stay in the second cache
constexpr std::size_t kGroupRows = 2048;   // rows of the weight gradient's product: 768 KiB of logit gradients
constexpr std::size_t kAmxBlockRows = 32;  // rows whose logits are alive at a time: one row of tiles ...
constexpr std::size_t kAvxBlockRows = 96;  // ... or many, because each block reads the packed weight

// Products of bfloat16 matrices, the right one packed, by the instructions in use. Each thread has its own.
class Products {
  public:
    Products() {
#if defined(GPO_HAS_AMX)
        if (in_use == Instructions::kAmx) tiles_.emplace();
#endif
    }
    std::size_t block_rows() const {
#if defined(GPO_HAS_AMX)
        if (tiles_) return kAmxBlockRows;
#endif
        return kAvxBlockRows;
    }

    // c (rows, columns) = or += a (rows, 2 pairs) b, with b packed and columns a multiple of 64.
    void operator()(const bf16* a, std::size_t lda, std::size_t rows, const pair* b, std::size_t pairs,
                    std::size_t columns, float* c, std::size_t ldc, bool accumulate) const {
#if defined(GPO_HAS_AMX)
        if (tiles_) return amx_multiply(a, lda, rows, b, pairs, columns, c, ldc, accumulate);
#endif
        multiply(a, lda, rows, b, pairs, columns, c, ldc, accumulate);
    }

  private:
#if defined(GPO_HAS_AMX)
    std::optional<AmxTiles> tiles_;
#endif
};

// Distance between rows of `count` numbers such that it is an odd number of cache lines: a column of the rows then
// spreads over all sets of the cache. What is added to a row is zeros, as the products want after an odd count.
std::size_t odd_lines(std::size_t count) {
    constexpr std::size_t kLine = 64 / sizeof(bf16);
    return ((count + kLine - 1) / kLine | 1) * kLine;
}

// The rows as the left operand of a product: a copy whose rows end with zeros.
struct Left {
    explicit Left(const LogprobInputs& in) : stride(odd_lines(in.width)), copy(in.rows * stride, true) {
        for (std::int64_t row = 0; row < in.rows; ++row)
            std::memcpy(copy.get() + row * stride, in.hidden + row * in.width, in.width * sizeof(bf16));
    }
    const bf16* row(std::size_t index) const { return copy.get() + index * stride; }

    std::size_t stride;
    Buffer<bf16> copy;
};

// The rows' transpose (width, rows), likewise.
struct LeftTransposed {
    LeftTransposed(const LogprobInputs& in, bool wanted)
        : stride(odd_lines(in.rows)), copy(wanted ? in.width * stride : 0, true) {
        constexpr std::int64_t kBlock = 32;
        if (!wanted) return;
        for (std::int64_t row = 0; row < in.rows; row += kBlock)
            for (std::int64_t h = 0; h < in.width; h += kBlock)
                for (std::int64_t i = row; i < std::min(row + kBlock, in.rows); ++i)
                    for (std::int64_t j = h; j < std::min(h + kBlock, in.width); ++j)
                        copy.get()[j * stride + i] = in.hidden[i * in.width + j];
    }

    std::size_t stride;
    Buffer<bf16> copy;
};

// first[row] .. first[row + 1] are the entries of a row.
std::vector<std::int64_t> entry_offsets(const LogprobInputs& in) {
    std::vector<std::int64_t> first(in.rows + 1, 0);
    for (std::int64_t entry = 0; entry < in.entries; ++entry) ++first[in.target_rows[entry] + 1];
    for (std::int64_t row = 0; row < in.rows; ++row) first[row + 1] += first[row];
    return first;
}

// raw -> z in place for one row's chunk, padded with -inf; slope gets d z / d raw times the temperature.
GPO_AVX512 void scale_logits(const LogprobInputs& in, std::size_t start, std::size_t count, std::size_t padded,
                             float* z, float* slope) {
    const __m512 inverse_temperature = _mm512_set1_ps(1.0f / in.temperature);
    for (std::size_t j = 0; j < padded; j += 16) {
        const std::size_t left = j >= count ? 0 : std::min<std::size_t>(count - j, 16);
        const __mmask16 inside = static_cast<__mmask16>((1u << left) - 1);
        __m512 value = _mm512_loadu_ps(z + j);
        if (in.bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(inside, in.bias + start + j));
        if (in.softcap > 0) {
            // tanh(a) = sign(a) (1 - e) / (1 + e) with e = exp(-2 |a|); its derivative is 4 e / (1 + e)^2.
            const __m512 a = _mm512_div_ps(value, _mm512_set1_ps(in.softcap));
            const __m512 one = _mm512_set1_ps(1.0f);
            const __m512 depth =
                _mm512_max_ps(_mm512_mul_ps(_mm512_abs_ps(a), _mm512_set1_ps(-2.0f)), _mm512_set1_ps(-200.0f));
            const __m512 e = exp_ps(depth);
            const __m512 below = _mm512_add_ps(one, e);
            __m512 tanh = _mm512_div_ps(_mm512_sub_ps(one, e), below);
            const __mmask16 negative = _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_LT_OQ);
            tanh = _mm512_mask_sub_ps(tanh, negative, _mm512_setzero_ps(), tanh);
            _mm512_storeu_ps(slope + j,
                             _mm512_div_ps(_mm512_mul_ps(_mm512_set1_ps(4.0f), e), _mm512_mul_ps(below, below)));
            value = _mm512_mul_ps(tanh, _mm512_set1_ps(in.softcap));
        }
        value = _mm512_mul_ps(value, inverse_temperature);
        _mm512_storeu_ps(z + j, _mm512_mask_blend_ps(inside, _mm512_set1_ps(-kInfinity), value));
    }
}

GPO_AVX512 float row_max(const float* z, std::size_t padded) {
    __m512 top = _mm512_set1_ps(-kInfinity);
    for (std::size_t j = 0; j < padded; j += 16) top = _mm512_max_ps(top, _mm512_loadu_ps(z + j));
    return _mm512_reduce_max_ps(top);
}

struct Sums {
    float mass;
    float moment;
};

// p = exp(z - origin) * slope in bfloat16, and the same times (z - origin) if `weighted`; the sums are
// without slope.
GPO_AVX512 Sums exponentiate(const float* z, std::size_t padded, float origin, const float* slope, bf16* p,
                             bf16* weighted) {
    __m512 mass = _mm512_setzero_ps(), moment = _mm512_setzero_ps();
    for (std::size_t j = 0; j < padded; j += 16) {
        // Below -200 the exponential is 0 in float32 anyway, and 0 times a finite number is 0.
        const __m512 centred =
            _mm512_max_ps(_mm512_sub_ps(_mm512_loadu_ps(z + j), _mm512_set1_ps(origin)), _mm512_set1_ps(-200.0f));
        __m512 e = exp_ps(centred);
        mass = _mm512_add_ps(mass, e);
        moment = _mm512_fmadd_ps(e, centred, moment);
        if (slope) e = _mm512_mul_ps(e, _mm512_loadu_ps(slope + j));
        if (p) store_bf16(p + j, e);
        if (weighted) store_bf16(weighted + j, _mm512_mul_ps(e, centred));
    }
    return {_mm512_reduce_add_ps(mass), _mm512_reduce_add_ps(moment)};
}

// accumulator = (accumulator - rise * other) * shrink; `other` may be null.
GPO_AVX512 void rescale(float* accumulator, const float* other, float rise, float shrink, std::size_t count) {
    const __m512 factor = _mm512_set1_ps(shrink), amount = _mm512_set1_ps(rise);
    for (std::size_t j = 0; j < count; j += 16) {
        __m512 value = _mm512_loadu_ps(accumulator + j);
        if (other) value = _mm512_fnmadd_ps(amount, _mm512_loadu_ps(other + j), value);
        _mm512_storeu_ps(accumulator + j, _mm512_mul_ps(value, factor));
    }
}

GPO_AVX512 void write_row(const float* values, std::size_t count, bf16* out) {
    for (std::size_t j = 0; j < count; j += 16) {
        const std::size_t left = std::min<std::size_t>(count - j, 16);
        store_bf16(out + j, _mm512_loadu_ps(values + j), static_cast<__mmask16>((1u << left) - 1));
    }
}

// Rows [begin, end) over the whole vocabulary.
GPO_AVX512 void forward_rows(const LogprobInputs& in, const ForwardOutputs& out, const Left& left,
                             const std::vector<std::int64_t>& first, std::size_t begin, std::size_t end) {
    const std::size_t count = end - begin, width = in.width, padded_width = round_up(width, kPanel);
    const std::size_t pairs = (width + 1) / 2;
    const Products product;
    const bool keep = out.expected != nullptr, keep_entropy = out.entropy_row != nullptr;
    Buffer<pair> by_logit(kVocab * pairs);
    Buffer<pair> by_width(keep ? padded_width * kVocab / 2 : 0);
    Buffer<float> z(product.block_rows() * kVocab), slopes(kVocab);
    Buffer<bf16> p(product.block_rows() * kVocab), weighted(keep_entropy ? product.block_rows() * kVocab : 0);
    Buffer<float> expected(keep ? count * padded_width : 0, true);
    Buffer<float> entropy_row(keep_entropy ? count * padded_width : 0, true);
    std::vector<float> top(count, -kInfinity);
    std::vector<double> mass(count, 0.0), moment(count, 0.0);
    const float* slope = in.softcap > 0 ? slopes.get() : nullptr;

    for (std::size_t start = 0; start < static_cast<std::size_t>(in.vocab); start += kVocab) {
        const std::size_t columns = std::min<std::size_t>(kVocab, in.vocab - start);
        const std::size_t padded = round_up(columns, kPanel);
        const bf16* weight = in.weight + start * width;
        pack_transposed(weight, width, columns, width, by_logit.get());
        const std::size_t depth = (columns + 1) / 2;
        if (keep) pack_rows(weight, width, columns, width, by_width.get(), depth);

        for (std::size_t block = 0; block < count; block += product.block_rows()) {
            const std::size_t rows = std::min(product.block_rows(), count - block);
            product(left.row(begin + block), left.stride, rows, by_logit.get(), pairs, padded, z.get(), kVocab, false);
            for (std::size_t r = 0; r < rows; ++r) {
                const std::size_t row = block + r;
                float* logits = z.get() + r * kVocab;
                bf16* probabilities = keep ? p.get() + r * kVocab : nullptr;
                bf16* products = keep_entropy ? weighted.get() + r * kVocab : nullptr;
                scale_logits(in, start, columns, padded, logits, slopes.get());
                const std::int64_t last = first[begin + row + 1];
                for (std::int64_t entry = first[begin + row]; entry < last; ++entry) {
                    const std::int64_t column = in.targets[entry] - static_cast<std::int64_t>(start);
                    if (column < 0 || column >= static_cast<std::int64_t>(columns)) continue;
                    out.target_logits[entry] = logits[column];
                    out.target_slopes[entry] = (slope ? slope[column] : 1.0f) / in.temperature;
                }
                const float new_top = std::max(top[row], row_max(logits, padded));
                const float origin = new_top == -kInfinity ? 0.0f : new_top;
                if (new_top > top[row] && top[row] != -kInfinity) {
                    const float rise = new_top - top[row], shrink = std::exp(-rise);
                    moment[row] = (moment[row] - rise * mass[row]) * shrink;
                    mass[row] *= shrink;
                    float* sums = expected.get() + row * padded_width;
                    if (keep_entropy) rescale(entropy_row.get() + row * padded_width, sums, rise, shrink, padded_width);
                    if (keep) rescale(sums, nullptr, 0.0f, shrink, padded_width);
                }
                top[row] = new_top;
                const Sums sums = exponentiate(logits, padded, origin, slope, probabilities, products);
                mass[row] += sums.mass;
                moment[row] += sums.moment;
                if (!keep) continue;
                for (std::int64_t entry = first[begin + row]; entry < last; ++entry) {
                    const std::int64_t column = in.targets[entry] - static_cast<std::int64_t>(start);
                    if (column < 0 || column >= static_cast<std::int64_t>(columns)) continue;
                    probabilities[column] = 0;
                    if (products) products[column] = 0;
                }
            }
            if (keep)
                product(p.get(), kVocab, rows, by_width.get(), depth, padded_width,
                        expected.get() + block * padded_width, padded_width, true);
            if (keep_entropy)
                product(weighted.get(), kVocab, rows, by_width.get(), depth, padded_width,
                        entropy_row.get() + block * padded_width, padded_width, true);
        }
    }
    for (std::size_t row = 0; row < count; ++row) {
        const double log_mass = std::log(mass[row]), mean = moment[row] / mass[row];
        out.lse[begin + row] = static_cast<float>(top[row] + log_mass);
        out.entropy[begin + row] = static_cast<float>(log_mass - mean);
        if (!keep) continue;
        const float scale = static_cast<float>(1.0 / (mass[row] * in.temperature));
        float* sums = expected.get() + row * padded_width;
        if (keep_entropy) {
            float* values = entropy_row.get() + row * padded_width;
            rescale(values, sums, static_cast<float>(mean), scale, padded_width);
            write_row(values, width, out.entropy_row + (begin + row) * width);
        }
        rescale(sums, nullptr, 0.0f, scale, padded_width);
        write_row(sums, width, out.expected + (begin + row) * width);
    }
}

// One row of d loss / d raw logit in bfloat16, written over a chunk; the bias gets the unrounded sum.
GPO_AVX512 void logit_gradient(const LogprobInputs& in, const BackwardInputs& gradients, std::size_t row,
                               const float* z, const float* slope, std::size_t padded, bf16* out, float* exact) {
    const __m512 lse = _mm512_set1_ps(gradients.lse[row]);
    const __m512 row_grad = _mm512_set1_ps(-gradients.row_grad[row]);
    const float entropy_grad = gradients.grad_entropy ? gradients.grad_entropy[row] : 0.0f;
    const __m512 entropy = _mm512_set1_ps(gradients.entropy[row]);
    const __m512 inverse_temperature = _mm512_set1_ps(1.0f / in.temperature);
    for (std::size_t j = 0; j < padded; j += 16) {
        const __m512 logprob = _mm512_max_ps(_mm512_sub_ps(_mm512_loadu_ps(z + j), lse), _mm512_set1_ps(-200.0f));
        const __m512 factor = _mm512_fnmadd_ps(_mm512_set1_ps(entropy_grad), _mm512_add_ps(logprob, entropy), row_grad);
        __m512 value = _mm512_mul_ps(_mm512_mul_ps(exp_ps(logprob), factor), inverse_temperature);
        if (slope) value = _mm512_mul_ps(value, _mm512_loadu_ps(slope + j));
        _mm512_storeu_ps(exact + j, value);
        store_bf16(out + j, value);
    }
}

bf16 to_bf16(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>((bits >> 16) | 0x40u);
    return static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// weight_gradient (columns, width) in bfloat16 from its transpose in float32 (width, kVocab).
GPO_AVX512 void write_transposed(const float* transposed, std::size_t columns, std::size_t width, bf16* out) {
    for (std::size_t h = 0; h < width; h += 16) {
        const std::size_t left = std::min<std::size_t>(width - h, 16);
        const __mmask16 inside = static_cast<__mmask16>((1u << left) - 1);
        for (std::size_t v = 0; v < columns; v += 16) {
            __m512i block[16];
#pragma GCC unroll 16
            for (std::size_t r = 0; r < 16; ++r)
                block[r] = r < left ? _mm512_loadu_si512(transposed + (h + r) * kVocab + v) : _mm512_setzero_si512();
            transpose_16x16(block);
#pragma GCC unroll 16
            for (std::size_t r = 0; r < 16; ++r)
                if (v + r < columns) store_bf16(out + (v + r) * width + h, _mm512_castsi512_ps(block[r]), inside);
        }
    }
}

// Vocabulary [begin, end) for all rows. `hidden_gradient` (rows, padded width) is this thread's share.
GPO_AVX512 void backward_vocab(const LogprobInputs& in, const BackwardInputs& gradients, const BackwardOutputs& out,
                               const Left& left, const LeftTransposed& transposed,
                               const std::vector<std::int64_t>& first, std::size_t begin, std::size_t end,
                               float* hidden_gradient) {
    const std::size_t rows = in.rows, width = in.width, padded_width = round_up(width, kPanel);
    const std::size_t pairs = (width + 1) / 2;
    const Products product;
    Buffer<pair> by_logit(kVocab * pairs);
    Buffer<pair> by_width(out.hidden ? padded_width * kVocab / 2 : 0);
    Buffer<pair> by_column(out.weight ? kVocab * round_up(std::min(kGroupRows, rows), 2) / 2 : 0);
    Buffer<float> z(product.block_rows() * kVocab), slopes(kVocab), exact(kVocab);
    Buffer<bf16> gradient(product.block_rows() * kVocab);
    Buffer<float> weight_gradient(out.weight ? width * kVocab : 0);
    const float* slope = in.softcap > 0 ? slopes.get() : nullptr;

    for (std::size_t start = begin; start < end; start += kVocab) {
        const std::size_t columns = std::min(kVocab, end - start);
        const std::size_t padded = round_up(columns, kPanel);
        const bf16* weight = in.weight + start * width;
        pack_transposed(weight, width, columns, width, by_logit.get());
        if (out.hidden) pack_rows(weight, width, columns, width, by_width.get(), (columns + 1) / 2);
        if (out.bias) std::fill(out.bias + start, out.bias + start + columns, 0.0f);

        for (std::size_t group = 0; group < rows; group += kGroupRows) {
            const std::size_t group_end = std::min(group + kGroupRows, rows), depth = (group_end - group + 1) / 2;
            for (std::size_t block = group; block < group_end; block += product.block_rows()) {
                const std::size_t height = std::min(product.block_rows(), group_end - block);
                product(left.row(block), left.stride, height, by_logit.get(), pairs, padded, z.get(), kVocab, false);
                for (std::size_t r = 0; r < height; ++r) {
                    const std::size_t row = block + r;
                    float* logits = z.get() + r * kVocab;
                    bf16* target = gradient.get() + r * kVocab;
                    scale_logits(in, start, columns, padded, logits, slopes.get());
                    logit_gradient(in, gradients, row, logits, slope, padded, target, exact.get());
                    for (std::int64_t entry = first[row]; entry < first[row + 1]; ++entry) {
                        const std::int64_t column = in.targets[entry] - static_cast<std::int64_t>(start);
                        if (column < 0 || column >= static_cast<std::int64_t>(columns)) continue;
                        const float factor = (slope ? slope[column] : 1.0f) / in.temperature;
                        exact.get()[column] += gradients.grad_logprobs[entry] * factor;
                        target[column] = to_bf16(exact.get()[column]);
                    }
                    if (out.bias)
                        for (std::size_t j = 0; j < columns; ++j) out.bias[start + j] += exact.get()[j];
                }
                if (out.hidden)
                    product(gradient.get(), kVocab, height, by_width.get(), (columns + 1) / 2, padded_width,
                            hidden_gradient + block * padded_width, padded_width, true);
                if (out.weight)
                    pack_rows(gradient.get(), kVocab, height, padded, by_column.get() + (block - group) / 2 * kPanel,
                              depth);
            }
            if (out.weight)
                product(transposed.copy.get() + group, transposed.stride, width, by_column.get(), depth, padded,
                        weight_gradient.get(), kVocab, group > 0);
        }
        if (out.weight) write_transposed(weight_gradient.get(), columns, width, out.weight + start * width);
    }
}

void check_instructions() {
    if (in_use == Instructions::kNone) throw std::runtime_error("no AVX-512 with BF16 in use: use the chunked path");
}

// Runs job(index, begin, end) on `threads` threads over [0, count) in near-equal parts of a multiple of
// `unit`.
template <typename Job>
void parallel(std::size_t count, std::size_t unit, int threads, const Job& job) {
    const std::size_t units = (count + unit - 1) / unit;
    const std::size_t workers = std::max<std::size_t>(1, std::min<std::size_t>(threads, units));
    std::vector<std::thread> others;
    for (std::size_t index = 1; index < workers; ++index)
        others.emplace_back([&, index] {
            job(index, units * index / workers * unit, std::min(count, units * (index + 1) / workers * unit));
        });
    job(0, 0, std::min(count, units / workers * unit));
    for (std::thread& other : others) other.join();
}

}  // namespace

void linear_logprob_forward(const LogprobInputs& in, const ForwardOutputs& out, int threads) {
    check_instructions();
    std::fill(out.target_logits, out.target_logits + in.entries, -kInfinity);
    std::fill(out.target_slopes, out.target_slopes + in.entries, 0.0f);
    const Left left(in);
    const std::vector<std::int64_t> first = entry_offsets(in);
    parallel(in.rows, 16, threads,
             [&](std::size_t, std::size_t begin, std::size_t end) { forward_rows(in, out, left, first, begin, end); });
}

void linear_logprob_backward(const LogprobInputs& in, const BackwardInputs& gradients, const BackwardOutputs& out,
                             int threads) {
    check_instructions();
    const Left left(in);
    const LeftTransposed transposed(in, out.weight != nullptr);
    const std::vector<std::int64_t> first = entry_offsets(in);
    const std::size_t rows = in.rows, width = in.width, padded_width = round_up(width, kPanel);
    std::vector<Buffer<float>> shares;
    for (int index = 0; out.hidden && index < threads; ++index) shares.emplace_back(rows * padded_width, true);
    parallel(in.vocab, kVocab, threads, [&](std::size_t index, std::size_t begin, std::size_t end) {
        backward_vocab(in, gradients, out, left, transposed, first, begin, end,
                       out.hidden ? shares[index].get() : nullptr);
    });
    if (!out.hidden) return;
    for (std::size_t row = 0; row < rows; ++row) {
        float* total = shares[0].get() + row * padded_width;
        for (std::size_t index = 1; index < shares.size(); ++index)
            for (std::size_t h = 0; h < width; ++h) total[h] += shares[index].get()[row * padded_width + h];
        write_row(total, width, out.hidden + row * width);
    }
}

#else

void linear_logprob_forward(const LogprobInputs&, const ForwardOutputs&, int) {
    throw std::runtime_error("this CPU has no AVX-512 with BF16");
}

void linear_logprob_backward(const LogprobInputs&, const BackwardInputs&, const BackwardOutputs&, int) {
    throw std::runtime_error("this CPU has no AVX-512 with BF16");
}

#endif

}  // namespace gpo_fast::cpu
