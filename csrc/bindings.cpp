// Python bindings of the C++ core. No torch header: arrays come and go as numpy arrays or raw data pointers.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace gpo_fast {
void bind_prefix_cache(py::module_& module);
void bind_rollout(py::module_& module);
void bind_cpu_losses(py::module_& module);
void bind_packing(py::module_& module);
void bind_tree_attention(py::module_& module);
}  // namespace gpo_fast

PYBIND11_MODULE(_C, module) {
    module.doc() = "The C++ core of gpo-fast.";
    gpo_fast::bind_prefix_cache(module);
    gpo_fast::bind_rollout(module);
    gpo_fast::bind_cpu_losses(module);
    gpo_fast::bind_packing(module);
    gpo_fast::bind_tree_attention(module);
}
