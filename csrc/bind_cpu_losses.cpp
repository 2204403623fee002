// Bindings of the CPU kernels of the losses. Arrays are raw data pointers (of torch tensors): the caller,
// gpo_fast.losses, has checked shapes, dtypes and contiguity.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "cpu/linear_logprob.h"

namespace py = pybind11;

namespace {

using namespace gpo_fast::cpu;

template <typename T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

LogprobInputs inputs(std::uintptr_t hidden, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t targets,
                     std::uintptr_t target_rows, std::int64_t rows, std::int64_t vocab, std::int64_t width,
                     std::int64_t entries, float temperature, float softcap) {
    LogprobInputs in;
    in.hidden = pointer<const bf16>(hidden);
    in.weight = pointer<const bf16>(weight);
    in.bias = pointer<const float>(bias);
    in.targets = pointer<const std::int64_t>(targets);
    in.target_rows = pointer<const std::int64_t>(target_rows);
    in.rows = rows;
    in.vocab = vocab;
    in.width = width;
    in.entries = entries;
    in.temperature = temperature;
    in.softcap = softcap;
    return in;
}

void forward(const LogprobInputs& in, std::uintptr_t target_logits, std::uintptr_t target_slopes, std::uintptr_t lse,
             std::uintptr_t entropy, std::uintptr_t expected, std::uintptr_t entropy_row, int threads) {
    ForwardOutputs out;
    out.target_logits = pointer<float>(target_logits);
    out.target_slopes = pointer<float>(target_slopes);
    out.lse = pointer<float>(lse);
    out.entropy = pointer<float>(entropy);
    out.expected = pointer<bf16>(expected);
    out.entropy_row = pointer<bf16>(entropy_row);
    py::gil_scoped_release release;
    linear_logprob_forward(in, out, threads);
}

void backward(const LogprobInputs& in, std::uintptr_t lse, std::uintptr_t entropy, std::uintptr_t row_grad,
              std::uintptr_t grad_logprobs, std::uintptr_t grad_entropy, std::uintptr_t hidden, std::uintptr_t weight,
              std::uintptr_t bias, int threads) {
    BackwardInputs gradients;
    gradients.lse = pointer<const float>(lse);
    gradients.entropy = pointer<const float>(entropy);
    gradients.row_grad = pointer<const float>(row_grad);
    gradients.grad_logprobs = pointer<const float>(grad_logprobs);
    gradients.grad_entropy = pointer<const float>(grad_entropy);
    BackwardOutputs out;
    out.hidden = pointer<bf16>(hidden);
    out.weight = pointer<bf16>(weight);
    out.bias = pointer<float>(bias);
    py::gil_scoped_release release;
    linear_logprob_backward(in, gradients, out, threads);
}

}  // namespace

namespace gpo_fast {

void bind_cpu_losses(py::module_& module) {
    py::class_<LogprobInputs>(module, "LogprobInputs", "Pointers to a head and its rows; 0 is null.")
        .def(py::init(&inputs), py::kw_only(), py::arg("hidden"), py::arg("weight"), py::arg("bias"),
             py::arg("targets"), py::arg("target_rows"), py::arg("rows"), py::arg("vocab"), py::arg("width"),
             py::arg("entries"), py::arg("temperature"), py::arg("softcap"));
    module.def("linear_logprob_kernels", &linear_logprob_kernels,
               "The instructions of the losses' kernels: 'amx', 'avx512' or 'none'.");
    module.def("use_linear_logprob_kernels", &use_linear_logprob_kernels, py::arg("name"),
               "Chooses 'amx', 'avx512' or 'none'.");
    module.def("linear_logprob_forward", &forward, py::arg("inputs"), py::kw_only(), py::arg("target_logits"),
               py::arg("target_slopes"), py::arg("lse"), py::arg("entropy"), py::arg("expected"),
               py::arg("entropy_row"), py::arg("threads"));
    module.def("linear_logprob_backward", &backward, py::arg("inputs"), py::kw_only(), py::arg("lse"),
               py::arg("entropy"), py::arg("row_grad"), py::arg("grad_logprobs"), py::arg("grad_entropy"),
               py::arg("hidden"), py::arg("weight"), py::arg("bias"), py::arg("threads"));
}

}  // namespace gpo_fast
