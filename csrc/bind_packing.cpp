// Binding of the packer. Output arrays are raw data pointers (of torch tensors) that the caller has sized.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "packing.h"

namespace py = pybind11;

namespace gpo_fast {

namespace {

using Rows = py::array_t<std::int64_t, py::array::c_style>;

std::int64_t* address(const py::dict& arrays, const char* name) {
    return reinterpret_cast<std::int64_t*>(arrays[name].cast<std::uintptr_t>());
}

// What is not within the packed row would be read or written out of bounds.
void check_ranges(const PackedRun* runs, py::ssize_t num_runs, const LossRange* ranges, py::ssize_t num_ranges,
                  std::int64_t num_tokens) {
    for (py::ssize_t i = 0; i < num_runs; ++i) {
        const PackedRun& run = runs[i];
        if (run.start < 0 || run.start >= run.end || run.end > num_tokens || run.before < -1 ||
            run.before >= run.start) {
            throw std::invalid_argument("a run must be 0 <= start < end <= " + std::to_string(num_tokens) +
                                        " and begin behind its 'before', got " + std::to_string(run.start) + " to " +
                                        std::to_string(run.end) + " behind " + std::to_string(run.before));
        }
    }
    for (py::ssize_t i = 0; i < num_ranges; ++i) {
        if (ranges[i].start < 0 || ranges[i].start > ranges[i].end || ranges[i].end > num_tokens) {
            throw std::invalid_argument("a range of losses must be 0 <= start <= end <= " + std::to_string(num_tokens) +
                                        ", got " + std::to_string(ranges[i].start) + " to " +
                                        std::to_string(ranges[i].end));
        }
    }
}

py::tuple fill(const Rows& runs, const py::list& tokens, const Rows& ranges, std::int64_t num_tokens,
               const py::dict& arrays) {
    if (runs.ndim() != 2 || runs.shape(1) != 4 || ranges.ndim() != 2 || ranges.shape(1) != 3) {
        throw std::invalid_argument("runs must be (runs, 4) and ranges (ranges, 3)");
    }
    if (static_cast<py::ssize_t>(tokens.size()) != runs.shape(0)) {
        throw std::invalid_argument("each run needs its tokens");
    }
    const auto* run_data = reinterpret_cast<const PackedRun*>(runs.data());
    const auto* range_data = reinterpret_cast<const LossRange*>(ranges.data());
    check_ranges(run_data, runs.shape(0), range_data, ranges.shape(0), num_tokens);
    std::vector<const std::int32_t*> pointers;
    pointers.reserve(tokens.size());
    for (const auto& item : tokens) {
        if (!py::isinstance<py::array>(item)) throw py::type_error("a run's tokens must be a numpy array");
        const auto array = py::reinterpret_borrow<py::array>(item);
        const std::int64_t* run = runs.data(static_cast<py::ssize_t>(pointers.size()), 0);
        if (!array.dtype().is(py::dtype::of<std::int32_t>()) || !(array.flags() & py::array::c_style) ||
            array.size() < run[1] - run[0]) {
            throw std::invalid_argument("a run's tokens must be a contiguous int32 array of at least its length");
        }
        pointers.push_back(static_cast<const std::int32_t*>(array.data()));
    }
    const PackedArrays out{address(arrays, "input_ids"),    address(arrays, "position_ids"),
                           address(arrays, "rows"),         address(arrays, "row_offsets"),
                           address(arrays, "pair_targets"), address(arrays, "pair_of_token"),
                           address(arrays, "targets"),      address(arrays, "sequence_ids")};
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
