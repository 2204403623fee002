// Binding of the packer. Output arrays are raw data pointers (of torch tensors) that the caller has sized.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "packing.h"

namespace py = pybind11;

namespace gpo_fast {

namespace {

using Rows = py::array_t<std::int64_t, py::array::c_style>;

std::int64_t* address(const py::dict& arrays, const char* name) {
    return reinterpret_cast<std::int64_t*>(arrays[name].cast<std::uintptr_t>());
}

py::tuple fill(const Rows& runs, const py::list& tokens, const Rows& ranges, std::int64_t num_tokens,
               const py::dict& arrays) {
    if (runs.ndim() != 2 || runs.shape(1) != 4 || ranges.ndim() != 2 || ranges.shape(1) != 3) {
        throw std::invalid_argument("runs must be (runs, 4) and ranges (ranges, 3)");
    }
    if (static_cast<py::ssize_t>(tokens.size()) != runs.shape(0)) {
        throw std::invalid_argument("each run needs its tokens");
    }
    std::vector<const std::int32_t*> pointers;
    pointers.reserve(tokens.size());
    for (const auto& item : tokens) {
        const auto array = py::reinterpret_borrow<py::array>(item);
        const std::int64_t* run = runs.data(static_cast<py::ssize_t>(pointers.size()), 0);
        if (!array.dtype().is(py::dtype::of<std::int32_t>()) || array.size() < run[1] - run[0]) {
            throw std::invalid_argument("a run's tokens must be an int32 array of at least its length");
        }
        pointers.push_back(static_cast<const std::int32_t*>(array.data()));
    }
    const PackedArrays out{address(arrays, "input_ids"),    address(arrays, "position_ids"),
                           address(arrays, "rows"),         address(arrays, "row_offsets"),
                           address(arrays, "pair_targets"), address(arrays, "pair_of_token"),
                           address(arrays, "targets"),      address(arrays, "sequence_ids")};
    const auto* run_data = reinterpret_cast<const PackedRun*>(runs.data());
    const auto* range_data = reinterpret_cast<const LossRange*>(ranges.data());
    PackedCounts counts{};
    {
        py::gil_scoped_release release;
        counts =
            fill_packed_arrays(run_data, pointers.data(), runs.shape(0), range_data, ranges.shape(0), num_tokens, out);
    }
    return py::make_tuple(counts.rows, counts.pairs);
}

}  // namespace

void bind_packing(py::module_& module) {
    module.def("fill_packed_arrays", &fill, "Fills a packed batch's arrays; gives the numbers of rows and of pairs.",
               py::arg("runs"), py::arg("tokens"), py::arg("ranges"), py::arg("num_tokens"), py::arg("arrays"));
}

}  // namespace gpo_fast
