// Binding of the packer. Output arrays are raw data pointers (of torch tensors) that the caller has sized.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "packing.h"

namespace py = pybind11;

namespace gpo_fast {

namespace {

using Nodes = py::array_t<std::int64_t, py::array::c_style>;
using std::to_string;

template <typename T>
T* address(const py::dict& arrays, const char* name) {
    return reinterpret_cast<T*>(arrays[name].cast<std::uintptr_t>());
}

// What the layout takes for granted; anything else would be read or written out of bounds.
std::vector<ForestNode> checked(const Nodes& table) {
    if (table.ndim() != 2 || table.shape(1) != 3) throw std::invalid_argument("nodes must be (nodes, 3)");
    const auto* data = reinterpret_cast<const ForestNode*>(table.data());
    std::vector<ForestNode> nodes(data, data + table.shape(0));
    for (std::size_t i = 0; i < nodes.size(); ++i) {
        const ForestNode& node = nodes[i];
        const bool child = node.parent >= 0 && node.parent < static_cast<std::int64_t>(i) &&
                           nodes[node.parent].start < node.start && node.start <= nodes[node.parent].end;
        if (!(child || (node.parent == -1 && node.start == 0)) || node.start > node.end) {
            throw std::invalid_argument("node " + to_string(i) + " must be a prompt from depth 0, or begin within or " +
                                        "right behind an earlier node, its parent, got the depths " +
                                        to_string(node.start) + " to " + to_string(node.end) + " with the parent " +
                                        to_string(node.parent));
        }
    }
    return nodes;
}

void check_branches(const std::vector<ForestNode>& nodes, const std::vector<std::int64_t>& branches) {
    const auto count = static_cast<std::int64_t>(nodes.size());
    for (const std::int64_t branch : branches) {
        if (branch < 0 || branch >= count) {
            throw std::invalid_argument("the forest has the nodes 0 to " + to_string(count - 1) + ", got the branch " +
                                        to_string(branch));
        }
    }
}

void check_starts(const std::vector<ForestNode>& nodes, const std::vector<std::int64_t>& branches,
                  const std::vector<std::int64_t>& loss_starts) {
    if (loss_starts.size() != branches.size()) {
        throw std::invalid_argument(to_string(branches.size()) + " branches need as many loss_starts, got " +
                                    to_string(loss_starts.size()));
    }
    for (std::size_t i = 0; i < branches.size(); ++i) {
        const std::int64_t end = nodes[branches[i]].end;
        if (loss_starts[i] < 1 || loss_starts[i] > end) {
            throw std::invalid_argument(
                "the path of node " + to_string(branches[i]) + " has " + to_string(end) +
                " tokens; its loss must start at a depth from 1 (the first token has nothing to be predicted from) "
                "to there, got " +
                to_string(loss_starts[i]));
        }
    }
}

PackedLayout make_layout(const Nodes& table, const std::vector<std::int64_t>& branches,
                         const std::optional<std::vector<std::int64_t>>& loss_starts) {
    const std::vector<ForestNode> nodes = checked(table);
    check_branches(nodes, branches);
    std::vector<std::int64_t> starts;
    for (const std::int64_t branch : branches) starts.push_back(nodes[branch].start);
    if (loss_starts) starts = *loss_starts;
    check_starts(nodes, branches, starts);
    PackedLayout layout = lay_out(nodes, branches, starts);
    if (layout.losses == 0) throw std::invalid_argument("nothing to train: no branch has a token with a loss");
    if (layout.tokens > std::numeric_limits<std::int32_t>::max())
        throw std::invalid_argument("a packed row holds at most 2^31 - 1 tokens, got " + to_string(layout.tokens));
    return layout;
}

// The tokens of each run, from an array for each node of the forest.
std::vector<const std::int32_t*> tokens_of(const PackedLayout& layout, const py::list& tokens) {
    std::vector<const std::int32_t*> pointers;
    pointers.reserve(layout.runs.size());
    for (const PackedRun& run : layout.runs) {
        if (run.node >= static_cast<std::int64_t>(tokens.size())) throw std::invalid_argument("each node needs tokens");
        const py::handle item = tokens[run.node];
        if (!py::isinstance<py::array>(item)) throw py::type_error("a node's tokens must be a numpy array");
        const auto array = py::reinterpret_borrow<py::array>(item);
        if (!array.dtype().is(py::dtype::of<std::int32_t>()) || !(array.flags() & py::array::c_style) ||
            array.size() < run.end - run.start) {
            throw std::invalid_argument("a node's tokens must be a contiguous int32 array of at least its length");
        }
        pointers.push_back(static_cast<const std::int32_t*>(array.data()));
    }
    return pointers;
}

py::tuple fill(const PackedLayout& layout, const py::list& tokens, const py::dict& arrays) {
    const std::vector<const std::int32_t*> pointers = tokens_of(layout, tokens);
    const PackedArrays out{
        address<std::int64_t>(arrays, "input_ids"),     address<std::int64_t>(arrays, "position_ids"),
        address<std::int32_t>(arrays, "subtree_end"),   address<std::int64_t>(arrays, "rows"),
        address<std::int64_t>(arrays, "row_offsets"),   address<std::int64_t>(arrays, "pair_targets"),
        address<std::int64_t>(arrays, "pair_of_token"), address<std::int64_t>(arrays, "targets"),
        address<std::int64_t>(arrays, "sequence_ids"),  address<std::int32_t>(arrays, "scratch")};
    PackedCounts counts{};
    {
        py::gil_scoped_release release;
        counts = fill_packed_arrays(layout, pointers.data(), out);
    }
    return py::make_tuple(counts.rows, counts.pairs);
}

py::list spans(const PackedLayout& layout) {
    py::list result;
    for (const Span& span : layout.spans) result.append(py::make_tuple(span.start, span.end));
    return result;
}

py::list blocks(const PackedLayout& layout) {
    py::list result;
    for (const Block& b : layout.blocks)
        result.append(py::make_tuple(b.query_start, b.query_end, b.key_start, b.key_end));
    return result;
}

}  // namespace

void bind_packing(py::module_& module) {
    py::class_<PackedLayout>(module, "PackedLayout", "Where each token of a forest stands in the packed row.")
        .def(py::init(&make_layout), py::arg("nodes"), py::arg("branches"), py::arg("loss_starts"),
             "nodes: int64 (nodes, 3) of parent, depth of the first token, depth behind the last one.\n"
             "loss_starts: a depth for each branch; None: where its own tokens begin.")
        .def("fill", &fill, "Fills a packed batch's arrays; gives the numbers of rows and of pairs.", py::arg("tokens"),
             py::arg("arrays"))
        .def_readonly("tokens", &PackedLayout::tokens)
        .def_readonly("losses", &PackedLayout::losses)
        .def_readonly("padded_tokens", &PackedLayout::padded_tokens)
        .def_readonly("kept", &PackedLayout::kept, "Places of the branches that have a loss.")
        .def_property_readonly("spans", &spans)
        .def_property_readonly("blocks", &blocks);
}

}  // namespace gpo_fast
