// Python face of PrefixCache. int64 handles and int32 tokens in contiguous numpy arrays are read in place; lists, other
// integer types and single ints are converted. Results are written straight into new numpy arrays. Batched calls
// release the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>

#include "prefix_cache.h"

namespace py = pybind11;

namespace gpo_fast {

namespace {

// An argument that is one integer or an array of them, read in place where its type allows.
template <typename T>
class Integers {
  public:
    Integers(const py::handle& value, const char* name) {
        if (PyLong_Check(value.ptr())) {
            int overflow = 0;
            const int64_t number = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
            if (overflow != 0) throw py::value_error(std::string(name) + " must fit an int64");
            single_ = narrow(number, name);
            values_ = {&single_, 1, true};
            return;
        }
        if (py::isinstance<py::array_t<T, py::array::c_style>>(value)) {
            const auto array = py::reinterpret_borrow<py::array>(value);
            values_ = {static_cast<const T*>(array.data()), static_cast<size_t>(array.size())};
            owner_ = array;
            return;
        }
        convert(value, name);
    }
    Integers(const Integers&) = delete;
    Integers& operator=(const Integers&) = delete;

    Values<T> values() const { return values_; }
    // For arguments where one integer is an array of one.
    Values<T> array() const { return {values_.data, values_.size}; }
    bool is_single() const { return values_.one_for_all; }

  private:
    static T narrow(int64_t value, const char* name) {
        if (value < std::numeric_limits<T>::min() || value > std::numeric_limits<T>::max()) {
            throw py::value_error(std::string(name) + " must fit an int" + std::to_string(8 * sizeof(T)) + ", got " +
                                  std::to_string(value));
        }
        return static_cast<T>(value);
    }

    void convert(const py::handle& value, const char* name) {
        const auto given = py::array::ensure(value);
        const char kind = given ? given.dtype().kind() : '?';
        if (!given || (kind != 'i' && kind != 'u' && given.size() > 0)) {
            PyErr_Clear();
            throw py::type_error(std::string(name) + " must be an integer, or a list or array of integers");
        }
        const auto wide = py::array_t<int64_t, py::array::c_style | py::array::forcecast>::ensure(given);
        converted_.resize(wide.size());
        const int64_t* from = wide.data();
        int64_t lowest = 0, highest = 0;
        for (size_t i = 0; i < converted_.size(); ++i) {
            lowest = std::min(lowest, from[i]);
            highest = std::max(highest, from[i]);
            converted_[i] = static_cast<T>(from[i]);
        }
        narrow(lowest, name);
        narrow(highest, name);
        values_ = {converted_.data(), converted_.size(), given.ndim() == 0};
    }

    Values<T> values_{nullptr, 0};
    T single_ = 0;
    std::vector<T> converted_;
    py::object owner_;
};

using HandleArgument = Integers<int64_t>;
using CountArgument = Integers<int32_t>;

template <typename T>
py::array_t<T> to_numpy(const std::vector<T>& values) {
    return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::tuple open_sequence(PrefixCache& cache, const py::object& tokens, int64_t name_space) {
    const CountArgument ids(tokens, "tokens");
    const auto [sequence, hit] = cache.open(ids.values().data, static_cast<int64_t>(ids.values().size), name_space);
    return py::make_tuple(sequence, hit);
}

bool reserve(PrefixCache& cache, const py::object& sequences, const py::object& lengths) {
    const HandleArgument handles(sequences, "seqs");
    const CountArgument counts(lengths, "n");
    const py::gil_scoped_release release;
    return cache.reserve(handles.array(), counts.values());
}

py::array_t<int32_t> append(PrefixCache& cache, const py::object& sequences, const py::object& tokens,
                            const py::object& lengths) {
    const HandleArgument handles(sequences, "seqs");
    const CountArgument ids(tokens, "token_ids");
    const CountArgument counts(lengths, "lengths");
    py::array_t<int32_t> slots(static_cast<py::ssize_t>(ids.values().size));
    int32_t* out = slots.mutable_data();
    const py::gil_scoped_release release;
    cache.append(handles.array(), ids.values().data, static_cast<int64_t>(ids.values().size), counts.values(), out);
    return slots;
}

py::array_t<int64_t> fork(PrefixCache& cache, const py::object& sources, const py::object& positions,
                          const py::object& counts) {
    const HandleArgument handles(sources, "source");
    const CountArgument places(positions, "pos");
    const CountArgument numbers(counts, "n");
    py::array_t<int64_t> forks(PrefixCache::number_of_forks(handles.array(), numbers.values()));
    int64_t* out = forks.mutable_data();
    const py::gil_scoped_release release;
    cache.fork(handles.array(), places.values(), numbers.values(), out);
    return forks;
}

py::object mark(PrefixCache& cache, const py::object& sources, const py::object& positions) {
    const HandleArgument handles(sources, "seq");
    const CountArgument places(positions, "pos");
    if (handles.is_single() && places.is_single()) {
        int64_t single;
        cache.mark(handles.array(), places.values(), &single);
        return py::int_(single);
    }
    // Several marks of one sequence: the sequence for each position.
    std::vector<int64_t> repeated;
    Handles named = handles.array();
    if (handles.is_single()) {
        repeated.assign(places.values().size, named[0]);
        named = {repeated.data(), repeated.size()};
    }
    py::array_t<int64_t> marks(static_cast<py::ssize_t>(named.size));
    cache.mark(named, places.values(), marks.mutable_data());
    return marks;
}

py::array_t<int32_t> block_tables(const PrefixCache& cache, const py::object& sequences) {
    const HandleArgument handles(sequences, "seqs");
    std::vector<int32_t> table;
    size_t width;
    {
        const py::gil_scoped_release release;
        width = cache.page_table(handles.array(), table);
    }
    return py::array_t<int32_t>({handles.array().size, width}, table.data());
}

py::tuple take_copies(PrefixCache& cache) {
    const std::vector<CopyJob> jobs = cache.take_copies();
    const auto count = static_cast<py::ssize_t>(jobs.size());
    py::array_t<int32_t> source(count), target(count), length(count);
    for (py::ssize_t i = 0; i < count; ++i) {
        source.mutable_data()[i] = jobs[i].source_slot;
        target.mutable_data()[i] = jobs[i].target_slot;
        length.mutable_data()[i] = jobs[i].length;
    }
    return py::make_tuple(source, target, length);
}

py::dict stats(const PrefixCache& cache) {
    const CacheStats s = cache.stats();
    py::dict result;
    result["num_blocks"] = s.num_blocks;
    result["free"] = s.free;
    result["cached"] = s.cached;
    result["live"] = s.live;
    result["stale"] = s.stale;
    result["reserved"] = s.reserved;
    result["sequences"] = s.sequences;
    result["marks"] = s.marks;
    result["pins"] = s.pins;
    result["runs"] = s.runs;
    result["hit_tokens"] = s.hit_tokens;
    result["opened_tokens"] = s.opened_tokens;
    result["evicted"] = s.evicted;
    result["copies"] = s.copies;
    result["deduplicated"] = s.deduplicated;
    result["epoch"] = s.epoch;
    return result;
}

std::string snapshot(const PrefixCache& cache, const std::string& format) {
    if (format != "text" && format != "dot") {
        throw py::value_error("format must be \"text\" or \"dot\", got \"" + format + "\"");
    }
    return cache.snapshot(format == "dot");
}

// A property that shows one of the plan's arrays; the array keeps the plan alive.
template <std::vector<int32_t> SharedPlan::* array>
py::array_t<int32_t> view(const py::object& self) {
    const auto& values = self.cast<const SharedPlan&>().*array;
    return py::array_t<int32_t>(static_cast<py::ssize_t>(values.size()), values.data(), self);
}

void bind_shared_plan(py::module_& module) {
    py::class_<SharedPlan, std::shared_ptr<SharedPlan>>(module, "SharedPlan",
                                                        R"(Which KV pages a batch of N sequences shares.

Group g of G is a longest stretch of full pages that one and the same set of two or more sequences shares. Groups come
in depth-first order, the outer before the inner. Every key of every sequence is in just one of its groups or in its
tail, whose length at any time is length(sequence) - tail_starts. All arrays are int32; do not write to them.)")
        .def_readonly("version", &SharedPlan::version, "Changes when any array does.")
        .def_property_readonly("group_starts", &view<&SharedPlan::group_starts>, "[G] position of the first token.")
        .def_property_readonly("group_lengths", &view<&SharedPlan::group_lengths>,
                               "[G] tokens, a multiple of block_size.")
        .def_property_readonly("page_offsets", &view<&SharedPlan::page_offsets>,
                               "[G + 1] group g has pages[page_offsets[g]:page_offsets[g + 1]].")
        .def_property_readonly("pages", &view<&SharedPlan::pages>, "The groups' pages, in order.")
        .def_property_readonly("row_offsets", &view<&SharedPlan::row_offsets>,
                               "[G + 1] group g has rows[row_offsets[g]:row_offsets[g + 1]].")
        .def_property_readonly("rows", &view<&SharedPlan::rows>,
                               "Indices of the groups' sequences in the batch, ascending in each group.")
        .def_property_readonly("tail_starts", &view<&SharedPlan::tail_starts>,
                               "[N] position from which on a sequence's tokens are its own.")
        .def_property_readonly("tail_offsets", &view<&SharedPlan::tail_offsets>,
                               "[N + 1] sequence i has tail_pages[tail_offsets[i]:tail_offsets[i + 1]].")
        .def_property_readonly("tail_pages", &view<&SharedPlan::tail_pages>, "The tails' pages, in order.");
}

}  // namespace

void bind_prefix_cache(py::module_& module) {
    py::register_exception<OutOfBlocks>(module, "OutOfBlocks", PyExc_MemoryError);
    bind_shared_plan(module);
    constexpr int32_t kNoPriority = std::numeric_limits<int32_t>::min();
    py::class_<PrefixCache>(module, "PrefixCache",
                            R"(Which KV pages hold which tokens, for sequences that branch anywhere.

Sequences, marks and pins are int handles; calls that take several accept lists or int64 arrays of them. A slot is
page * block_size + offset. Misuse raises ValueError and leaves the cache intact. Calls may come from several threads.

Args:
    num_blocks: pages in the pool.
    block_size: tokens in a page.)")
        .def(py::init<int32_t, int32_t>(), py::arg("num_blocks"), py::arg("block_size") = 16)
        .def_property_readonly("block_size", &PrefixCache::block_size)
        .def("begin_epoch", &PrefixCache::begin_epoch, py::arg("version"),
             "Nothing committed before can match from now on; its pages are evicted first. Gives up all pins.")
        .def("open", &open_sequence, py::arg("tokens"), py::arg("namespace") = 0,
             "(sequence, hit): the longest committed prefix in the namespace, at most all but the last token.")
        .def("reserve", &reserve, py::arg("seqs"), py::arg("n"),
             "Room for n more tokens in each sequence (one n, or one for each); or False and no change.")
        .def("append", &append, py::arg("seqs"), py::arg("token_ids"), py::arg("lengths"),
             "int32 slots of the new tokens: lengths[i] of the flat token_ids for seqs[i]. Raises OutOfBlocks, having "
             "changed nothing, where reserve would say False.")
        .def("fork", &fork, py::arg("source"), py::arg("pos"), py::arg("n") = 1,
             "int64 handles of n sequences that share the first pos tokens of a sequence or mark. With arrays: n[i] "
             "of source[i] at pos[i], in order.")
        .def("mark", &mark, py::arg("seq"), py::arg("pos"),
             "A handle that keeps the first pos tokens of a sequence or mark, to fork from later. With arrays: one "
             "for each.")
        .def(
            "commit",
            [](PrefixCache& cache, const py::object& sequences) {
                const HandleArgument handles(sequences, "seqs");
                const py::gil_scoped_release release;
                cache.commit(handles.array());
            },
            py::arg("seqs"),
            "Makes the computed tokens of one or many sequences matchable. Full pages that are matchable already are "
            "replaced by those and freed: read block tables and plans again afterwards.")
        .def("truncate", &PrefixCache::truncate, py::arg("seq"), py::arg("length"),
             "Drops the tokens of a sequence from position `length` on. Pages that reserve set aside stay so, but may "
             "be one too few if the sequence now ends within a page that others use.")
        .def(
            "release",
            [](PrefixCache& cache, const py::object& handles) {
                const HandleArgument released(handles, "seqs");
                const py::gil_scoped_release release;
                cache.release(released.array());
            },
            py::arg("seqs"), "Lets go of one or many sequences and marks. What was committed stays cached.")
        .def(
            "pin",
            [](PrefixCache& cache, int64_t source, int32_t priority, std::optional<int32_t> position) {
                if (position && *position < 0) {
                    throw py::value_error("pos must not be negative, got " + std::to_string(*position));
                }
                return cache.pin(source, priority, position.value_or(-1));
            },
            py::arg("seq"), py::arg("priority") = 0, py::arg("pos") = py::none(),
            "A handle that keeps the first pos tokens (by default all) of a sequence or mark from eviction, until "
            "unpin, begin_epoch, or evict with a higher priority.")
        .def("unpin", &PrefixCache::unpin, py::arg("pin"))
        .def("take_copies", &take_copies,
             "int32 (source slot, target slot, length) of the copies to make before the next write.")
        .def("acknowledge_copies", &PrefixCache::acknowledge_copies, "The copies taken are done: their sources may go.")
        .def("evict", &PrefixCache::evict, py::arg("n"), py::arg("priority") = kNoPriority,
             py::call_guard<py::gil_scoped_release>(),
             "Frees up to n cached pages, least recently used first, from the ends of runs; returns how many. Pins "
             "of a lower priority than the one given are given up, lowest first, if there are not enough others.")
        .def("length", &PrefixCache::length, py::arg("seq"))
        .def(
            "tokens", [](const PrefixCache& cache, int64_t handle) { return to_numpy(cache.tokens(handle)); },
            py::arg("seq"))
        .def(
            "block_table", [](const PrefixCache& cache, int64_t handle) { return to_numpy(cache.pages(handle)); },
            py::arg("seq"))
        .def("block_tables", &block_tables, py::arg("seqs"),
             "int32 (sequences, most pages): each sequence's pages, then zeros.")
        .def(
            "plan",
            [](PrefixCache& cache, const py::object& sequences) {
                const HandleArgument handles(sequences, "seqs");
                std::shared_ptr<const SharedPlan> plan;
                {
                    const py::gil_scoped_release release;
                    plan = cache.plan(handles.array());
                }
                return std::const_pointer_cast<SharedPlan>(plan);  // Python has no const; the arrays say "do not write"
            },
            py::arg("seqs"), "The SharedPlan of a batch; the same object until an array changes.")
        .def("check_integrity", &PrefixCache::check_integrity, "Raises RuntimeError naming a broken invariant.")
        .def("snapshot", &snapshot, py::arg("format") = "text", "The tree as readable text, or as Graphviz (\"dot\").")
        .def("bookkeeping_bytes", &PrefixCache::bookkeeping_bytes, "Memory of everything but the token ids.")
        .def("stats", &stats,
             "Counts of pages (free + cached + live = num_blocks; cached includes stale, live includes reserved), of "
             "handles and of events.");
}

}  // namespace gpo_fast
