#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "cpu/decoder.h"
#include "cpu/kernels.h"
#include "cpu/sampling.h"
#include "cpu/shared_attention.h"

namespace py = pybind11;

namespace gpo_fast {

namespace {

using namespace cpu;

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;
using Ints = Array<int32_t>;

void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

using Linear = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t>;  // panels, bias or 0, inputs, outputs

PackedLinear to_linear(const Linear& linear) {
    const auto [panels, bias, inputs, outputs] = linear;
    return {reinterpret_cast<const void*>(panels), reinterpret_cast<const float*>(bias), inputs, outputs};
}

const float* floats(uintptr_t pointer) { return reinterpret_cast<const float*>(pointer); }

void bind_attention(py::module_& module) {
    py::class_<AttentionPlan>(module, "AttentionPlan",
                              "Which keys each row of a step sees, as segments of pages shared by rows.")
        .def(py::init([](const Ints& page_offsets, const Ints& pages, const Ints& row_offsets, const Ints& rows,
                         const Ints& visible, int64_t num_rows, int32_t num_heads, int32_t num_kv_heads,
                         int32_t head_dim, int32_t block_size, float scale, float softcap, bool is_bfloat16) {
                 const int64_t count = page_offsets.size() - 1;
                 require(num_kv_heads >= 1 && num_heads >= 1 && num_heads % num_kv_heads == 0,
                         "num_heads must be a multiple of num_kv_heads");
                 require(head_dim >= 1 && block_size >= 1 && num_rows >= 0,
                         "head_dim and block_size must be at least 1, and num_rows at least 0");
                 require(count >= 0 && row_offsets.size() == count + 1 && rows.size() == visible.size() &&
                             page_offsets.data()[0] == 0 && row_offsets.data()[0] == 0 &&
                             page_offsets.data()[count] == pages.size() && row_offsets.data()[count] == rows.size(),
                         "the arrays of the segments do not fit one another");
                 require(std::all_of(pages.data(), pages.data() + pages.size(), [](int32_t page) { return page >= 0; }),
                         "a segment names a negative page");
                 for (int64_t s = 0; s < count; ++s) {
                     require(page_offsets.data()[s] <= page_offsets.data()[s + 1] &&
                                 row_offsets.data()[s] <= row_offsets.data()[s + 1],
                             "the offsets of the segments must ascend");
                     const int64_t keys =
                         static_cast<int64_t>(page_offsets.data()[s + 1] - page_offsets.data()[s]) * block_size;
                     for (int32_t i = row_offsets.data()[s]; i < row_offsets.data()[s + 1]; ++i)
                         require(rows.data()[i] >= 0 && rows.data()[i] < num_rows && visible.data()[i] >= 0 &&
                                     visible.data()[i] <= keys,
                                 "a segment names a row that is not there or keys beyond its pages");
                 }
                 return AttentionPlan(
                     {count, page_offsets.data(), pages.data(), row_offsets.data(), rows.data(), visible.data()},
                     num_rows, {num_heads, num_kv_heads, head_dim, block_size, scale, softcap, is_bfloat16});
             }),
             py::kw_only(), py::arg("page_offsets"), py::arg("pages"), py::arg("row_offsets"), py::arg("rows"),
             py::arg("visible"), py::arg("num_rows"), py::arg("num_heads"), py::arg("num_kv_heads"),
             py::arg("head_dim"), py::arg("block_size"), py::arg("scale"), py::arg("softcap"),
             py::arg("is_bfloat16").noconvert())
        .def(
            "attend",
            [](AttentionPlan& plan, uintptr_t query, uintptr_t keys, uintptr_t values, uintptr_t output, int threads) {
                py::gil_scoped_release release;
                shared_attention(plan, reinterpret_cast<const void*>(query), reinterpret_cast<const void*>(keys),
                                 reinterpret_cast<const void*>(values), reinterpret_cast<void*>(output), threads);
            },
            "One layer: query and output [rows, heads, head size], contiguous, of the pool's type, by data pointers.",
            py::arg("query"), py::arg("keys"), py::arg("values"), py::arg("output"), py::kw_only(), py::arg("threads"));
}

void bind_decoder(py::module_& module) {
    py::class_<Decoder>(module, "Decoder", "The forward pass of a Llama-like decoder; weights by data pointers.")
        .def(py::init<int64_t, float, bool>(), py::kw_only(), py::arg("width"), py::arg("norm_epsilon"),
             py::arg("is_bfloat16").noconvert())
        .def(
            "add_layer",
            [](Decoder& decoder, uintptr_t input_norm, uintptr_t attention_norm, uintptr_t query_norm,
               uintptr_t key_norm, const Linear& qkv, const Linear& output, const Linear& gate, const Linear& up,
               const Linear& down, uintptr_t keys, uintptr_t values) {
                decoder.add_layer({floats(input_norm), floats(attention_norm), floats(query_norm), floats(key_norm),
                                   to_linear(qkv), to_linear(output), to_linear(gate), to_linear(up), to_linear(down),
                                   reinterpret_cast<void*>(keys), reinterpret_cast<void*>(values)});
            },
            py::kw_only(), py::arg("input_norm"), py::arg("attention_norm"), py::arg("query_norm"), py::arg("key_norm"),
            py::arg("qkv"), py::arg("output"), py::arg("gate"), py::arg("up"), py::arg("down"), py::arg("keys"),
            py::arg("values"))
        .def(
            "set_head",
            [](Decoder& decoder, uintptr_t norm, const Linear& head) {
                decoder.set_head(floats(norm), to_linear(head));
            },
            py::arg("final_norm"), py::arg("head"))
        .def(
            "forward",
            [](Decoder& decoder, AttentionPlan& plan, uintptr_t x, uintptr_t cos, uintptr_t sin,
               const Array<int64_t>& slots, const Ints& selected, uintptr_t logits, int threads) {
                const DecoderBatch batch{reinterpret_cast<float*>(x),
                                         floats(cos),
                                         floats(sin),
                                         slots.data(),
                                         slots.size(),
                                         selected.data(),
                                         selected.size(),
                                         reinterpret_cast<float*>(logits)};
                require(plan.num_rows() == batch.rows, "the plan and the slots have different numbers of rows");
                py::gil_scoped_release release;
                decoder.forward(batch, plan, threads);
            },
            "Logits of the selected rows; x [rows, width] is overwritten.", py::kw_only(), py::arg("plan"),
            py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("slots"), py::arg("selected"), py::arg("logits"),
            py::arg("threads"));
}

}  // namespace

void bind_rollout(py::module_& module) {
    module.def("cpu_kernels", [] { return kernels().name; }, "The instruction set of the CPU kernels in use.");
    module.def("use_cpu_kernels", &use_kernels, py::arg("name").none(false),
               "Chooses 'amx', 'avx512', 'avx2' or 'portable' kernels.");
    module.def(
        "pack_panels",
        [](uintptr_t weight, int64_t outputs, int64_t inputs, bool is_bfloat16, uintptr_t panels, int threads) {
            py::gil_scoped_release release;
            pack_panels(reinterpret_cast<const void*>(weight), outputs, inputs, is_bfloat16,
                        reinterpret_cast<void*>(panels), threads);
        },
        "A weight [outputs, inputs], by data pointer, in panels of 64 outputs: float32 [panels, inputs, 64] or "
        "bfloat16 [panels, 2, inputs / 2, 32, 2].",
        py::kw_only(), py::arg("weight"), py::arg("outputs"), py::arg("inputs"), py::arg("is_bfloat16").noconvert(),
        py::arg("panels"), py::arg("threads"));
    bind_attention(module);
    bind_decoder(module);
    module.def(
        "sample",
        [](uintptr_t logits, int64_t vocabulary, const Array<float>& temperature, const Ints& top_k,
           const Array<float>& top_p, const Array<float>& min_p, const Array<double>& uniform, int threads) {
            const auto rows = temperature.size();
            require(top_k.size() == rows && top_p.size() == rows && min_p.size() == rows && uniform.size() == rows,
                    "the arrays of the sampling parameters differ in length");
            py::array_t<int64_t> tokens(rows);
            py::array_t<double> logprobs(rows), sampling(rows);
            const SamplingJob job{
                floats(logits),         rows,         vocabulary,     temperature.data(),    top_k.data(),
                top_p.data(),           min_p.data(), uniform.data(), tokens.mutable_data(), logprobs.mutable_data(),
                sampling.mutable_data()};
            {
                py::gil_scoped_release release;
                sample(job, threads);
            }
            return py::make_tuple(tokens, logprobs, sampling);
        },
        "(tokens, logprobs, sampling logprobs) of float32 logits [rows, vocabulary].", py::arg("logits"), py::kw_only(),
        py::arg("vocabulary"), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"),
        py::arg("uniform"), py::arg("threads"));
}

}  // namespace gpo_fast
