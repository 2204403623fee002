// Python bindings of the C++ core. No torch header: arrays come and go as numpy arrays or raw data pointers.
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_C, module) { module.doc() = "The C++ core of gpo-fast."; }
