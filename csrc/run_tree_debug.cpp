// RunTree's self-check and pictures. Slow and independent of the counters that the fast paths keep.
#include <algorithm>
#include <stdexcept>

#include "run_tree.h"

namespace gpo_fast {

namespace {

void require(bool condition, const char* invariant) {
    if (!condition) throw std::logic_error(std::string("broken invariant: ") + invariant);
}

const char* const kKindNames[] = {"free", "sequence", "mark", "pin", "copy"};

}  // namespace

void RunTree::check_integrity() const {
    std::vector<uint8_t> is_free_run(runs.size());
    for (const int32_t id : free_runs) is_free_run[id] = 1;
    std::vector<int32_t> owners(num_blocks);
    for (const int32_t page : free_pages) ++owners[page];
    int64_t cached_pages = 0, stale_pages = 0, listed = 0, attached = 0;
    for (size_t id = 0; id < runs.size(); ++id) {
        if (is_free_run[id]) continue;
        const Run& run = runs[id];
        for (const int32_t page : run.pages) ++owners[page];
        attached += check_holders(static_cast<int32_t>(id));
        check_children(static_cast<int32_t>(id));
        check_index(static_cast<int32_t>(id));
        if (run.is_root()) {
            require(run.tokens.empty() && run.committed == 0, "a root has no tokens");
            continue;
        }
        check_run(run);
        cached_pages += run.cached;
        if (run.epoch != epoch) stale_pages += run.cached;
        listed += run.listed;
    }
    for (const int32_t count : owners) require(count == 1, "a page is free or belongs to one run");
    require(cached_pages == cached, "free + cached + live = total");
    require(stale_pages == stale, "stale pages are the cached ones of older epochs");
    const auto held = std::count_if(holders.begin(), holders.end(),
                                    [](const Holder& holder) { return holder.kind != HolderKind::kFree; });
    require(attached == held, "every holder stands at a run");
    require(check_list(fresh_, true) + check_list(stale_, false) == listed, "every evictable run is in its list");
}

void RunTree::check_run(const Run& run) const {
    require(run.start % block_size == 0, "a run starts on a page boundary");
    require(!run.tokens.empty(), "a run has tokens");
    require(static_cast<int32_t>(run.pages.size()) == pages_for(run.end() - run.start), "a run's pages fit its tokens");
    require(run.start <= run.lock && run.lock <= run.end(), "a run is held within its tokens");
    require(run.start <= run.committed && run.committed <= run.end(), "a run is matchable within its tokens");
    require(run.end() == std::max(run.lock, run.committed), "what is neither held nor matchable is free");
    require(run.cached == static_cast<int32_t>(run.pages.size()) - pages_for(run.lock - run.start),
            "cached pages are those behind the lock");
    require(run.listed == (run.cached > 0), "a run with cached pages is in the list of evictable runs");
    require(run.indexed == (run.committed > run.start), "a matchable run is in its parent's index");
    const Run& parent = runs[run.parent];
    require(parent.is_root() ? run.start == 0 : parent.start < run.start && run.start <= parent.end(),
            "a run hangs within its parent");
    require(run.epoch == parent.epoch && run.name_space == parent.name_space, "a path has one epoch and namespace");
    require(run.committed == run.start || parent.is_root() || parent.committed >= run.start,
            "what is above a matchable run is matchable");
    require(run.writer == kNone || holders[run.writer].length == run.end(), "a run's writer stands at its end");
}

// Returns how many holders stand at a run.
int64_t RunTree::check_holders(int32_t id) const {
    const Run& run = runs[id];
    int64_t count = 0;
    int32_t highest = run.start;
    int32_t previous = kNone;
    bool has_writer = run.writer == kNone;
    for (int32_t at = run.first_holder; at != kNone; previous = at, at = holders[at].next, ++count) {
        const Holder& holder = holders[at];
        require(holder.kind != HolderKind::kFree && holder.run == id, "a run's holders know it");
        require(holder.previous == previous, "the list of holders is linked both ways");
        require(run.is_root() ? holder.length == 0 : run.start < holder.length && holder.length <= run.end(),
                "a holder stands within its run");
        highest = std::max(highest, holder.length);
        has_writer |= run.writer == at;
    }
    for (int32_t child = run.first_child; child != kNone; child = runs[child].next_sibling) {
        if (runs[child].is_live()) highest = std::max(highest, runs[child].start);
    }
    require(run.is_root() || highest == run.lock, "a run's lock is its highest hold");
    require(has_writer, "a run's writer is one of its holders");
    return count;
}

void RunTree::check_children(int32_t id) const {
    int32_t previous = kNone;
    size_t indexed = 0;
    for (int32_t child = runs[id].first_child; child != kNone; child = runs[child].next_sibling) {
        require(runs[child].parent == id, "a run's children know it");
        require(runs[child].previous_sibling == previous, "the list of children is linked both ways");
        indexed += runs[child].indexed;
        previous = child;
    }
    require(indexed == runs[id].index.size(), "the index has the matchable children");
}

// Children in the index differ from each other, and from the run itself, in their first page. (One that is not full may
// be the beginning of another.)
void RunTree::check_index(int32_t id) const {
    const Run& run = runs[id];
    const auto first_page = [this](const Run& child) {
        return std::vector<int32_t>(child.tokens.begin(),
                                    child.tokens.begin() + std::min(child.committed - child.start, block_size));
    };
    for (size_t i = 0; i < run.index.size(); ++i) {
        const Run& child = runs[run.index[i].run];
        require(run.index[i].start == child.start, "the index knows where a child starts");
        const std::vector<int32_t> page = first_page(child);
        if (i > 0) {
            const Run& before = runs[run.index[i - 1].run];
            require(before.start < child.start || (before.start == child.start && first_page(before) < page),
                    "children differ in their first page, and the index is sorted");
        }
        const int32_t own = std::min(run.committed - child.start, block_size);
        if (own != static_cast<int32_t>(page.size())) continue;
        require(!std::equal(page.begin(), page.end(), run.tokens.begin() + (child.start - run.start)),
                "a child differs from its parent in its first page");
    }
}

int64_t RunTree::check_list(const List& list, bool fresh) const {
    int64_t count = 0;
    int32_t older = kNone;
    for (int32_t id = list.oldest; id != kNone; older = id, id = runs[id].newer, ++count) {
        require(runs[id].listed && (runs[id].epoch == epoch) == fresh, "a list has the runs of its age");
        require(runs[id].older == older, "the list of evictable runs is linked both ways");
    }
    require(list.newest == older, "a list ends with its newest run");
    return count;
}

int64_t RunTree::bookkeeping_bytes() const {
    size_t bytes = runs.capacity() * sizeof(Run) + holders.capacity() * sizeof(Holder) +
                   (free_pages.capacity() + free_runs.capacity() + free_holders.capacity()) * sizeof(int32_t);
    for (const Run& run : runs) {
        bytes += run.pages.capacity() * sizeof(int32_t) + run.index.capacity() * sizeof(ChildEntry);
        bytes += (run.tokens.capacity() - run.tokens.size()) * sizeof(int32_t);
    }
    return static_cast<int64_t>(bytes);
}

// -- pictures ---------------------------------------------------------------------------------------------------

namespace {

template <typename T>
std::string join(const std::vector<T>& values, size_t most) {
    std::string text;
    for (size_t i = 0; i < std::min(values.size(), most); ++i) text += (i ? " " : "") + std::to_string(values[i]);
    return values.size() > most ? text + " ... (" + std::to_string(values.size()) + ")" : text;
}

}  // namespace

std::string RunTree::describe(const Run& run) const {
    if (run.is_root()) {
        return "namespace " + std::to_string(run.name_space) + " epoch " + std::to_string(run.epoch) +
               (run.epoch == epoch ? "" : " (stale)");
    }
    std::string text = "[" + std::to_string(run.start) + ", " + std::to_string(run.end()) + ")";
    text += " matchable to " + std::to_string(run.committed) + ", held to " + std::to_string(run.lock);
    text += ", pages " + join(run.pages, 8) + ", tokens " + join(run.tokens, 8);
    return text;
}

std::string RunTree::describe_holders(const Run& run) const {
    std::string text;
    for (int32_t id = run.first_holder; id != kNone; id = holders[id].next) {
        text += text.empty() ? "" : ", ";
        text += kKindNames[static_cast<int>(holders[id].kind)] + (" " + std::to_string(id)) + "@" +
                std::to_string(holders[id].length);
    }
    return text;
}

std::string RunTree::dump() const {
    std::string text = "pages: " + std::to_string(num_blocks) + " of " + std::to_string(block_size) + " tokens, " +
                       std::to_string(free_pages.size()) + " unwritten, " + std::to_string(cached) + " cached\n";
    std::vector<std::pair<int32_t, int32_t>> stack;  // run, depth
    for (size_t id = runs.size(); id-- > 0;) {
        const bool empty = runs[id].first_child == kNone && runs[id].first_holder == kNone;
        if (runs[id].is_root() && !empty) stack.push_back({static_cast<int32_t>(id), 0});
    }
    while (!stack.empty()) {
        const auto [id, depth] = stack.back();
        stack.pop_back();
        const Run& run = runs[id];
        const std::string held = describe_holders(run);
        text += std::string(2 * depth, ' ') + describe(run) + (held.empty() ? "" : "; " + held) + "\n";
        for (int32_t child = run.first_child; child != kNone; child = runs[child].next_sibling) {
            stack.push_back({child, depth + 1});
        }
    }
    return text;
}

std::string RunTree::dot() const {
    std::string text = "digraph prefix_cache {\n  node [shape=box, fontname=monospace, style=filled];\n";
    for (size_t id = 0; id < runs.size(); ++id) {
        const Run& run = runs[id];
        if (run.is_root() && run.first_child == kNone && run.first_holder == kNone) continue;
        const char* colour = run.is_root() ? "lightgrey" : run.is_live() ? "lightblue" : "white";
        const std::string held = describe_holders(run);
        text += "  r" + std::to_string(id) + " [label=\"" + describe(run) + (held.empty() ? "" : "\\n" + held) +
                "\", fillcolor=" + colour + "];\n";
        if (run.is_root()) continue;
        text += "  r" + std::to_string(run.parent) + " -> r" + std::to_string(id) + " [label=\"at " +
                std::to_string(run.start) + "\"];\n";
    }
    return text + "}\n";
}

}  // namespace gpo_fast
