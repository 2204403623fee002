// Bindings of tree attention on a CPU. Arrays are raw data pointers (of torch tensors): the caller,
// gpo_fast.tree_attention, has checked shapes, dtypes and strides.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>

#include "cpu/tree_attention.h"

namespace py = pybind11;

namespace {

using namespace gpo_fast::cpu;

using Address = std::uintptr_t;
using View = std::tuple<Address, std::int64_t, std::int64_t>;  // data, token stride, head stride

template <typename T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

HeadsView heads_view(const View& view) {
    return {pointer<const bf16>(std::get<0>(view)), std::get<1>(view), std::get<2>(view)};
}

TreeAttentionInputs inputs(const View& query, const View& key, const View& value, Address subtree_end,
                           std::int64_t tokens, std::int64_t heads, std::int64_t kv_heads, std::int64_t dim,
                           float scale) {
    TreeAttentionInputs in;
    in.query = heads_view(query);
    in.key = heads_view(key);
    in.value = heads_view(value);
    in.subtree_end = pointer<const std::int32_t>(subtree_end);
    in.tokens = tokens;
    in.heads = heads;
    in.kv_heads = kv_heads;
    in.dim = dim;
    in.scale = scale;
    return in;
}

void forward(const TreeAttentionInputs& in, Address out, Address lse, int threads) {
    py::gil_scoped_release release;
    tree_attention_forward(in, pointer<bf16>(out), pointer<float>(lse), threads);
}

void backward(const TreeAttentionInputs& in, Address out, Address lse, const View& grad_out, Address grad_query,
              Address grad_key, Address grad_value, int threads) {
    py::gil_scoped_release release;
    tree_attention_backward(in, pointer<const bf16>(out), pointer<const float>(lse), heads_view(grad_out),
                            pointer<bf16>(grad_query), pointer<bf16>(grad_key), pointer<bf16>(grad_value), threads);
}

}  // namespace

namespace gpo_fast {

void bind_tree_attention(py::module_& module) {
    py::class_<TreeAttentionInputs>(module, "TreeAttentionInputs",
                                    "Tensors as (pointer, token stride, head stride), and their shape.")
        .def(py::init(&inputs), py::kw_only(), py::arg("query"), py::arg("key"), py::arg("value"),
             py::arg("subtree_end"), py::arg("tokens"), py::arg("heads"), py::arg("kv_heads"), py::arg("dim"),
             py::arg("scale"));
    module.def("tree_attention_supported", &tree_attention_supported, py::arg("dim"),
               "Whether this CPU has AMX with BF16 and heads of `dim` fit: a multiple of 32 up to 256.");
    module.def("tree_attention_forward", &forward, py::arg("inputs"), py::kw_only(), py::arg("out"), py::arg("lse"),
               py::arg("threads"));
    module.def("tree_attention_backward", &backward, py::arg("inputs"), py::kw_only(), py::arg("out"), py::arg("lse"),
               py::arg("grad_out"), py::arg("grad_query"), py::arg("grad_key"), py::arg("grad_value"),
               py::arg("threads"));
}

}  // namespace gpo_fast
