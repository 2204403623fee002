#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "prefix_cache.h"

namespace py = pybind11;

namespace gpo_fast {

namespace {

using Ints = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
using Handles = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

template <typename T>
py::array_t<T> to_numpy(const std::vector<T>& values) {
    return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

std::vector<int64_t> to_handles(const py::object& value) {
    if (py::isinstance<py::int_>(value)) return {value.cast<int64_t>()};
    const Handles array = value.cast<Handles>();
    return {array.data(), array.data() + array.size()};
}

std::vector<int32_t> to_lengths(const py::object& value, size_t count) {
    if (py::isinstance<py::int_>(value)) return std::vector<int32_t>(count, value.cast<int32_t>());
    const Ints array = value.cast<Ints>();
    return {array.data(), array.data() + array.size()};
}

}  // namespace

void bind_prefix_cache(py::module_& module) {
    py::register_exception<OutOfBlocks>(module, "OutOfBlocks", PyExc_MemoryError);
    py::class_<PrefixCache>(module, "PrefixCache",
                            R"(Which KV pages hold which tokens, for sequences that branch anywhere.

Sequences are int handles; calls that take several accept lists or int64 arrays of them. A slot is
page * block_size + offset. Misuse raises ValueError and leaves the cache intact.)")
        .def(py::init<int32_t, int32_t>(), py::arg("num_blocks"), py::arg("block_size") = 16)
        .def_property_readonly("block_size", &PrefixCache::block_size)
        .def("begin_epoch", &PrefixCache::begin_epoch, py::arg("version"),
             "Nothing committed before can match from now on.")
        .def(
            "open",
            [](PrefixCache& cache, const Ints& tokens) {
                return cache.open(tokens.data(), static_cast<int32_t>(tokens.size()));
            },
            py::arg("tokens"), "(sequence, hit): the longest committed prefix, at most all but the last token.")
        .def(
            "reserve",
            [](PrefixCache& cache, const py::object& sequences, const py::object& lengths) {
                const auto handles = to_handles(sequences);
                return cache.reserve(handles, to_lengths(lengths, handles.size()));
            },
            py::arg("seqs"), py::arg("n"), "Room for n more tokens in each sequence, or False and no change.")
        .def(
            "append",
            [](PrefixCache& cache, const py::object& sequences, const Ints& tokens, const py::object& lengths) {
                const auto handles = to_handles(sequences);
                const auto counts = to_lengths(lengths, handles.size());
                int64_t total = 0;
                for (int32_t count : counts) total += count;
                if (total != tokens.size()) {
                    throw std::invalid_argument("lengths add up to " + std::to_string(total) + ", but " +
                                                std::to_string(tokens.size()) + " tokens came");
                }
                return to_numpy(cache.append(handles, tokens.data(), counts));
            },
            py::arg("seqs"), py::arg("token_ids"), py::arg("lengths"), "The slot of each new token.")
        .def(
            "fork",
            [](PrefixCache& cache, int64_t source, int32_t position, int32_t count) {
                return to_numpy(cache.fork(source, position, count));
            },
            py::arg("source"), py::arg("pos"), py::arg("n") = 1, "n sequences that share the first pos tokens.")
        .def(
            "mark",
            [](PrefixCache& cache, int64_t source, int32_t position) { return cache.fork(source, position, 1)[0]; },
            py::arg("seq"), py::arg("pos"), "A handle that keeps the first pos tokens alive, to fork from later.")
        .def("commit", &PrefixCache::commit, py::arg("seq"), "Makes a sequence's computed tokens matchable.")
        .def("truncate", &PrefixCache::truncate, py::arg("seq"), py::arg("length"))
        .def(
            "release", [](PrefixCache& cache, const py::object& sequences) { cache.release(to_handles(sequences)); },
            py::arg("seqs"))
        .def(
            "take_copies",
            [](PrefixCache& cache) {
                std::vector<int32_t> source, target, length;
                for (const CopyJob& job : cache.take_copies()) {
                    source.push_back(job.source_slot);
                    target.push_back(job.target_slot);
                    length.push_back(job.length);
                }
                return py::make_tuple(to_numpy(source), to_numpy(target), to_numpy(length));
            },
            "(source slot, target slot, length) of the copies to make before the next write.")
        .def("acknowledge_copies", &PrefixCache::acknowledge_copies, "The copies taken are done: their sources may go.")
        .def("evict", &PrefixCache::evict, py::arg("n"), "Pages freed, least recently used first.")
        .def("length", &PrefixCache::length, py::arg("seq"))
        .def(
            "tokens", [](const PrefixCache& cache, int64_t sequence) { return to_numpy(cache.tokens(sequence)); },
            py::arg("seq"))
        .def(
            "block_table", [](const PrefixCache& cache, int64_t sequence) { return to_numpy(cache.pages(sequence)); },
            py::arg("seq"))
        .def(
            "block_tables",
            [](const PrefixCache& cache, const py::object& sequences) {
                const auto handles = to_handles(sequences);
                size_t width = 1;
                for (int64_t handle : handles) width = std::max(width, cache.pages(handle).size());
                py::array_t<int32_t> table({handles.size(), width});
                int32_t* row = table.mutable_data();
                for (int64_t handle : handles) {
                    const auto& pages = cache.pages(handle);
                    std::fill(std::copy(pages.begin(), pages.end(), row), row + width, 0);
                    row += width;
                }
                return table;
            },
            py::arg("seqs"), "int32 (sequences, most pages): each sequence's pages, then zeros.")
        .def("check_integrity", &PrefixCache::check_integrity, "Raises RuntimeError naming a broken invariant.")
        .def("stats", [](const PrefixCache& cache) {
            const CacheStats s = cache.stats();
            return py::dict(py::arg("num_blocks") = s.num_blocks, py::arg("free") = s.free,
                            py::arg("cached") = s.cached, py::arg("live") = s.live, py::arg("sequences") = s.sequences,
                            py::arg("hit_tokens") = s.hit_tokens, py::arg("opened_tokens") = s.opened_tokens,
                            py::arg("evicted") = s.evicted, py::arg("copies") = s.copies);
        });
}

}  // namespace gpo_fast
