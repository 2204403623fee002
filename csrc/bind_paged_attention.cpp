#include <pybind11/pybind11.h>

#include "cpu/paged_attention.h"

namespace py = pybind11;

namespace gpo_fast {

void bind_paged_attention(py::module_& module) {
    module.def(
        "paged_attention",
        [](uintptr_t query, uintptr_t keys, uintptr_t values, uintptr_t output, uintptr_t tables, uintptr_t lengths,
           int64_t rows, int64_t table_width, int32_t num_heads, int32_t num_kv_heads, int32_t head_dim,
           int32_t block_size, float scale, float softcap, bool is_bfloat16, int threads) {
            if (num_kv_heads < 1 || num_heads % num_kv_heads != 0) {
                throw std::invalid_argument("num_heads must be a multiple of num_kv_heads");
            }
            const PagedAttention job{reinterpret_cast<const void*>(query),
                                     reinterpret_cast<const void*>(keys),
                                     reinterpret_cast<const void*>(values),
                                     reinterpret_cast<void*>(output),
                                     reinterpret_cast<const int32_t*>(tables),
                                     reinterpret_cast<const int32_t*>(lengths),
                                     rows,
                                     table_width,
                                     num_heads,
                                     num_kv_heads,
                                     head_dim,
                                     block_size,
                                     scale,
                                     softcap};
            py::gil_scoped_release release;
            paged_attention(job, is_bfloat16, threads);
        },
        "Attention of single query tokens over a paged KV pool; contiguous tensors by their data pointers.",
        py::arg("query"), py::arg("keys"), py::arg("values"), py::arg("output"), py::arg("tables"), py::arg("lengths"),
        py::kw_only(), py::arg("rows"), py::arg("table_width"), py::arg("num_heads"), py::arg("num_kv_heads"),
        py::arg("head_dim"), py::arg("block_size"), py::arg("scale"), py::arg("softcap"), py::arg("is_bfloat16"),
        py::arg("threads"));
}

}  // namespace gpo_fast
