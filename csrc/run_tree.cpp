#include "run_tree.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace gpo_fast {

namespace {

// Equal tokens at the start of a and b. memcmp finds the differing block, a loop the token.
int32_t common_prefix(const int32_t* a, const int32_t* b, int32_t count) {
    int32_t n = 0;
    for (const int32_t block : {1024, 64}) {
        while (n + block <= count && std::memcmp(a + n, b + n, block * sizeof(int32_t)) == 0) n += block;
    }
    while (n < count && a[n] == b[n]) ++n;
    return n;
}

}  // namespace

RunTree::RunTree(int32_t num_blocks, int32_t block_size) : num_blocks(num_blocks), block_size(block_size) {
    if (num_blocks < 1) throw std::invalid_argument("num_blocks must be at least 1, got " + std::to_string(num_blocks));
    if (block_size < 1) throw std::invalid_argument("block_size must be at least 1, got " + std::to_string(block_size));
    if (int64_t{num_blocks} * block_size > INT32_MAX) {
        throw std::invalid_argument("num_blocks * block_size must be below 2^31, since slots are int32; got " +
                                    std::to_string(num_blocks) + " * " + std::to_string(block_size));
    }
    if ((block_size & (block_size - 1)) == 0) {
        for (shift_ = 0; (1 << shift_) < block_size;) ++shift_;
    }
    free_pages.reserve(num_blocks);
    for (int32_t page = num_blocks; page-- > 0;) free_pages.push_back(page);
}

// -- matching ---------------------------------------------------------------------------------------------------

int32_t RunTree::root(int64_t name_space) {
    const auto known = roots_.find(name_space);
    if (known != roots_.end() && runs[known->second].epoch == epoch) return known->second;
    const int32_t id = take_run_slot();
    runs[id].epoch = epoch;
    runs[id].name_space = name_space;
    const int32_t old = known == roots_.end() ? kNone : known->second;
    roots_[name_space] = id;
    if (old != kNone) drop_unused_root(old);
    return id;
}

Place RunTree::match(int64_t name_space, const int32_t* tokens, int32_t limit) const {
    const auto known = roots_.find(name_space);
    if (known == roots_.end() || runs[known->second].epoch != epoch) return {kNone, 0};
    return walk({known->second, 0}, tokens, 0, limit);
}

// Goes on from a place that is known to match; tokens[0] stands at position `first`.
Place RunTree::walk(Place at, const int32_t* tokens, int32_t first, int32_t limit) const {
    for (;;) {
        const Run& run = runs[at.run];
        const int32_t stop = std::min(run.committed, limit);
        if (stop > at.position) {
            at.position += common_prefix(run.tokens.data() + (at.position - run.start), tokens + (at.position - first),
                                         stop - at.position);
        }
        if (at.position >= limit || run.index.empty()) return at;
        // Children that left the run before this page differ from it in a page that matched: they cannot do better.
        const int32_t page = page_start(at.position);
        const Candidate child = best_child(run, page, tokens + (page - first), std::min(limit - page, block_size));
        if (child.match <= at.position - page) return at;
        at = {child.run, page};
    }
}

FirstPage RunTree::first_page(int32_t id) const {
    const Run& run = runs[id];
    return {run.start, run.tokens.data(), std::min(run.committed - run.start, block_size)};
}

bool ChildOrder::operator()(int32_t a, int32_t b) const { return (*this)(a, tree->first_page(b)); }

bool ChildOrder::operator()(int32_t a, const FirstPage& b) const {
    const FirstPage own = tree->first_page(a);
    if (own.start != b.start) return own.start < b.start;
    return std::lexicographical_compare(own.tokens, own.tokens + own.count, b.tokens, b.tokens + b.count);
}

// Of all strings, a neighbour in the sorted order shares the longest prefix with a given one.
RunTree::Candidate RunTree::best_child(const Run& parent, int32_t start, const int32_t* tokens, int32_t count) const {
    Candidate best{kNone, 0};
    const auto consider = [&](int32_t id) {
        const FirstPage child = first_page(id);
        if (child.start != start) return;
        const int32_t match = common_prefix(child.tokens, tokens, std::min(child.count, count));
        if (match > best.match) best = {id, match};
    };
    const auto next = parent.index.lower_bound(FirstPage{start, tokens, count});
    if (next != parent.index.end()) consider(*next);
    if (next != parent.index.begin()) consider(*std::prev(next));
    return best;
}

int32_t RunTree::run_at(int32_t run, int32_t position) const {
    while (!runs[run].is_root() && runs[run].start >= position) run = runs[run].parent;
    return run;
}

void RunTree::copy_tokens(int32_t run, int32_t length, int32_t* tokens) const {
    for (; !runs[run].is_root(); length = runs[run].start, run = runs[run].parent) {
        const Run& from = runs[run];
        std::copy_n(from.tokens.data(), length - from.start, tokens + from.start);
    }
}

void RunTree::copy_pages(int32_t run, int32_t length, int32_t* pages) const {
    for (; !runs[run].is_root(); length = runs[run].start, run = runs[run].parent) {
        const Run& from = runs[run];
        std::copy_n(from.pages.data(), pages_for(length - from.start), pages + page_index(from.start));
    }
}

// -- runs -------------------------------------------------------------------------------------------------------

int32_t RunTree::take_run_slot() {
    int32_t id;
    if (free_runs.empty()) {
        id = static_cast<int32_t>(runs.size());
        runs.emplace_back();
    } else {
        id = free_runs.back();
        free_runs.pop_back();
    }
    runs[id].index = ChildIndex(ChildOrder{this});
    return id;
}

// Moves `runs`: references into it do not survive.
int32_t RunTree::new_run(int32_t parent, int32_t start) {
    const int32_t id = take_run_slot();
    Run& run = runs[id];
    run.start = run.committed = run.lock = run.hot = start;
    run.epoch = runs[parent].epoch;
    run.name_space = runs[parent].name_space;
    link_child(id, parent);
    return id;
}

void RunTree::link_child(int32_t id, int32_t parent) {
    Run& run = runs[id];
    run.parent = parent;
    run.previous_sibling = kNone;
    run.next_sibling = runs[parent].first_child;
    if (run.next_sibling != kNone) runs[run.next_sibling].previous_sibling = id;
    runs[parent].first_child = id;
}

void RunTree::unlink_child(int32_t id) {
    const Run& run = runs[id];
    if (run.next_sibling != kNone) runs[run.next_sibling].previous_sibling = run.previous_sibling;
    if (run.previous_sibling != kNone) {
        runs[run.previous_sibling].next_sibling = run.next_sibling;
    } else {
        runs[run.parent].first_child = run.next_sibling;
    }
}

// A run without pages: nothing holds it and nothing hangs from it.
void RunTree::remove_run(int32_t id) {
    const int32_t parent = runs[id].parent;
    if (runs[id].indexed) remove_from_index(id);
    if (runs[id].listed) unlist(id);
    unlink_child(id);
    runs[id] = Run{};
    free_runs.push_back(id);
    if (runs[parent].is_root()) drop_unused_root(parent);
}

// Roots of older epochs go with their last run and holder; those of this epoch stay for the next match.
void RunTree::drop_unused_root(int32_t id) {
    const Run& run = runs[id];
    if (run.epoch == epoch || run.first_child != kNone || run.first_holder != kNone) return;
    if (roots_.at(run.name_space) == id) return;
    runs[id] = Run{};
    free_runs.push_back(id);
}

void RunTree::add_to_index(int32_t id) {
    runs[id].place = runs[runs[id].parent].index.insert(id).first;
    runs[id].indexed = true;
}

void RunTree::remove_from_index(int32_t id) {
    runs[runs[id].parent].index.erase(runs[id].place);
    runs[id].indexed = false;
}

// -- holders ----------------------------------------------------------------------------------------------------

int32_t RunTree::new_holder(HolderKind kind) {
    int32_t id;
    if (free_holders.empty()) {
        id = static_cast<int32_t>(holders.size());
        holders.emplace_back();
    } else {
        id = free_holders.back();
        free_holders.pop_back();
    }
    holders[id].kind = kind;
    return id;
}

void RunTree::free_holder(int32_t id) {
    Holder& holder = holders[id];
    holder.kind = HolderKind::kFree;
    holder.run = kNone;
    holder.generation = (holder.generation + 1) & 0x7fffffff;
    free_holders.push_back(id);
}

void RunTree::link_holder(int32_t id, int32_t run, int32_t position) {
    Holder& holder = holders[id];
    holder.run = run;
    holder.length = position;
    holder.previous = kNone;
    holder.next = runs[run].first_holder;
    if (holder.next != kNone) holders[holder.next].previous = id;
    runs[run].first_holder = id;
}

void RunTree::unlink_holder(int32_t id) {
    const Holder& holder = holders[id];
    if (holder.next != kNone) holders[holder.next].previous = holder.previous;
    if (holder.previous != kNone) {
        holders[holder.previous].next = holder.next;
    } else {
        runs[holder.run].first_holder = holder.next;
    }
    if (runs[holder.run].writer == id) runs[holder.run].writer = kNone;
}

void RunTree::attach(int32_t holder, int32_t run, int32_t position) {
    link_holder(holder, run, position);
    raise(run, position);
}

void RunTree::attach_new(HolderKind kind, int32_t run, int32_t position, int32_t count, int64_t* handles) {
    for (int32_t i = 0; i < count; ++i) {
        const int32_t holder = new_holder(kind);
        link_holder(holder, run, position);
        handles[i] = handle_of(holder);
    }
    if (count > 0) raise(run, position);
}

void RunTree::detach(int32_t id) {
    const int32_t run = holders[id].run;
    unlink_holder(id);
    if (runs[run].is_root()) {
        drop_unused_root(run);
    } else if (holders[id].length == runs[run].lock) {
        lower(run);
    }
}

void RunTree::move(int32_t id, int32_t run, int32_t position) {
    const int32_t old_run = holders[id].run;
    const int32_t old_position = holders[id].length;
    unlink_holder(id);
    attach(id, run, position);  // before anything is let go
    if (runs[old_run].is_root()) {
        drop_unused_root(old_run);
    } else if (old_position == runs[old_run].lock) {
        lower(old_run);
    }
}

// A run is held up to `position`, and with it all that is above.
void RunTree::raise(int32_t id, int32_t position) {
    while (!runs[id].is_root() && runs[id].lock < position) {
        Run& run = runs[id];
        const bool was_live = run.is_live();
        run.lock = position;
        count_cached(id);
        if (was_live) return;
        position = run.start;
        id = run.parent;
    }
}

// A holder or a child that stood at the run's lock has gone.
void RunTree::lower(int32_t id) {
    while (!runs[id].is_root()) {
        Run& run = runs[id];
        const int32_t lock = highest_hold(run);
        if (lock == run.lock) return;
        if (run.listed) run.hot = std::max(run.hot, run.lock);
        run.lock = lock;
        const int32_t parent = run.parent;
        const int32_t start = run.start;
        const bool live = run.is_live();
        settle(id);
        if (live || runs[parent].lock != start) return;
        id = parent;
    }
}

int32_t RunTree::highest_hold(const Run& run) const {
    int32_t highest = run.start;
    for (int32_t id = run.first_holder; id != kNone; id = holders[id].next) {
        highest = std::max(highest, holders[id].length);
        if (highest == run.lock) return highest;
    }
    for (int32_t id = run.first_child; id != kNone; id = runs[id].next_sibling) {
        if (runs[id].is_live()) highest = std::max(highest, runs[id].start);
        if (highest == run.lock) return highest;
    }
    return highest;
}

// Frees what is neither held nor matchable.
void RunTree::settle(int32_t id) {
    Run& run = runs[id];
    const int32_t keep = std::max(run.lock, run.committed);
    if (run.end() > keep) shrink(run, keep);
    count_cached(id);
    if (run.pages.empty()) remove_run(id);
}

void RunTree::shrink(Run& run, int32_t end) {
    const size_t keep = pages_for(end - run.start);
    while (run.pages.size() > keep) {
        free_pages.push_back(run.pages.back());
        run.pages.pop_back();
    }
    run.tokens.resize(end - run.start);
}

// -- writing ----------------------------------------------------------------------------------------------------

bool RunTree::may_extend(int32_t id) const {
    const Holder& holder = holders[id];
    const Run& run = runs[holder.run];
    return !run.is_root() && run.end() == holder.length && (run.writer == kNone || run.writer == id);
}

void RunTree::write(Run& run, const int32_t* tokens, int32_t count, int32_t* slots) {
    int32_t offset = page_offset(static_cast<int32_t>(run.tokens.size()));
    run.tokens.insert(run.tokens.end(), tokens, tokens + count);
    while (count > 0) {
        if (offset == 0) {
            run.pages.push_back(free_pages.back());
            free_pages.pop_back();
            ++version;
        }
        const int32_t here = std::min(count, block_size - offset);
        const int32_t slot = run.pages.back() * block_size + offset;
        for (int32_t i = 0; i < here; ++i) *slots++ = slot + i;
        count -= here;
        offset = 0;
    }
}

void RunTree::extend(int32_t id, const int32_t* tokens, int32_t count, int32_t* slots) {
    Holder& holder = holders[id];
    Run& run = runs[holder.run];
    write(run, tokens, count, slots);
    holder.length = run.lock = run.end();
    run.writer = id;
}

void RunTree::branch(int32_t id, const int32_t* tokens, int32_t count, int32_t* slots) {
    const Place from{holders[id].run, holders[id].length};
    const int32_t start = page_start(from.position);
    const int32_t child = new_run(run_at(from.run, start), start);
    Run& run = runs[child];
    if (from.position > start) {
        const Run& source = runs[from.run];
        const int32_t* repeated = source.tokens.data() + (start - source.start);
        run.tokens.assign(repeated, repeated + (from.position - start));
        run.pages.push_back(free_pages.back());
        free_pages.pop_back();
    }
    write(run, tokens, count, slots);
    ++version;
    move(id, child, run.end());
    runs[child].writer = id;
}

// -- eviction ---------------------------------------------------------------------------------------------------

void RunTree::count_cached(int32_t id) {
    Run& run = runs[id];
    const int32_t count = static_cast<int32_t>(run.pages.size()) - pages_for(run.lock - run.start);
    cached += count - run.cached;
    if (run.epoch != epoch) stale += count - run.cached;
    run.cached = count;
    if (count > 0 && !run.listed) {
        run.hot = run.start;
        push_newest(id);
    } else if (count == 0 && run.listed) {
        unlist(id);
    }
}

void RunTree::push_newest(int32_t id) {
    Run& run = runs[id];
    List& list = list_of(run);
    run.older = list.newest;
    run.newer = kNone;
    (list.newest == kNone ? list.oldest : runs[list.newest].newer) = id;
    list.newest = id;
    run.listed = true;
}

void RunTree::unlist(int32_t id) {
    Run& run = runs[id];
    List& list = list_of(run);
    (run.older == kNone ? list.oldest : runs[run.older].newer) = run.newer;
    (run.newer == kNone ? list.newest : runs[run.newer].older) = run.older;
    run.listed = false;
}

// A run enters the list of evictable runs when it is let go, after the runs below it, so the oldest one seldom has
// children. What was used of it while its tail lay idle (`hot`) counts as used later: when eviction reaches that
// part, or a child, the run gets a second chance at the other end of the list. A chance is paid for by the use or
// the child that gave it, so a page costs O(1).
int32_t RunTree::evict(int32_t count) {
    int32_t done = 0;
    while (done < count && cached > 0) {
        const int32_t id = stale_.oldest != kNone ? stale_.oldest : fresh_.oldest;
        Run& run = runs[id];
        const int32_t child = run.index.empty() ? run.start : runs[*run.index.rbegin()].start;
        const int32_t keep = pages_for(std::max({run.lock, run.hot, child}) - run.start);
        const int32_t removable = static_cast<int32_t>(run.pages.size()) - keep;
        if (removable <= 0) {
            unlist(id);
            run.hot = run.start;
            push_newest(id);
            continue;
        }
        const int32_t taken = std::min(removable, count - done);
        const int32_t pages = static_cast<int32_t>(run.pages.size()) - taken;
        shrink(run, run.start + pages * block_size);
        run.committed = run.end();
        done += taken;
        count_cached(id);
        if (run.pages.empty()) remove_run(id);
    }
    evicted += done;
    return done;
}

// Runs of older epochs are evicted before all others; nothing else is to be done now.
void RunTree::begin_epoch(int64_t version) {
    epoch = version;
    stale = cached;
    if (fresh_.oldest == kNone) return;
    (stale_.newest == kNone ? stale_.oldest : runs[stale_.newest].newer) = fresh_.oldest;
    runs[fresh_.oldest].older = stale_.newest;
    stale_.newest = fresh_.newest;
    fresh_ = {};
}

// -- committing -------------------------------------------------------------------------------------------------

void RunTree::commit(int32_t id) {
    for (;;) {
        // The topmost run of the path that cannot be matched as far as the path follows it.
        Place next{kNone, 0};
        int32_t end = holders[id].length;
        for (int32_t run = holders[id].run; !runs[run].is_root(); end = runs[run].start, run = runs[run].parent) {
            if (runs[run].committed < end) next = {run, end};
        }
        if (next.run == kNone || !commit_run(next.run, next.position)) return;
    }
}

// Makes a run matchable up to `position`, or hands its holders to runs that say the same. False: the rest of the
// path stays private, because it ends within a page that can be matched already.
bool RunTree::commit_run(int32_t id, int32_t position) {
    const int32_t start = runs[id].start;
    const int32_t page = page_start(runs[id].committed);  // only here can a matchable run say the same
    const int32_t count = std::min(position - page, block_size);
    if (runs[id].indexed && page == start) remove_from_index(id);  // its first page, by which it is found, grows
    const int32_t above = page == start ? runs[id].parent : id;
    const int32_t* tokens = runs[id].tokens.data() + (page - start);
    Candidate twin = best_child(runs[above], page, tokens, count);
    if (above != id && runs[above].committed > page) {
        const Run& parent = runs[above];
        const int32_t match = common_prefix(parent.tokens.data() + (page - parent.start), tokens,
                                            std::min(parent.committed - page, count));
        if (match > twin.match) twin = {above, match};
    }
    const bool said = twin.match == count;
    // A sequence keeps its own last page while that is not full: it will write there. A page that a pending copy
    // reads must stay as well.
    const bool replace = said && count == block_size && runs[id].copy_sources == 0;
    if (replace) {
        merge(id, page, twin.run, position);
        return true;
    }
    if (!said) runs[id].committed = position;
    if (!runs[id].indexed && runs[id].committed > start) add_to_index(id);
    return !said;
}

// The run's full pages from `from` on stand in `twin` and below it as well. Whatever holds them holds those instead,
// and what the run has behind them becomes a run of its own.
void RunTree::merge(int32_t id, int32_t from, int32_t twin, int32_t position) {
    const int32_t start = runs[id].start;
    const Place found = walk({twin, from}, runs[id].tokens.data() + (from - start), from, page_start(position));
    const int32_t upto = page_start(found.position);
    const int32_t last = run_at(found.run, upto);
    int32_t tail = kNone;
    if (runs[id].end() > upto) {
        tail = new_run(last, upto);
        Run& run = runs[id];
        Run& rest = runs[tail];
        rest.tokens.assign(run.tokens.begin() + (upto - start), run.tokens.end());
        rest.pages.assign(run.pages.begin() + page_index(upto - start), run.pages.end());
        run.tokens.resize(upto - start);
        run.pages.resize(page_index(upto - start));
    }
    const int32_t writer = runs[id].writer;
    const auto new_run_at = [&](int32_t at) { return at > upto ? tail : run_at(last, at); };
    for (int32_t holder = runs[id].first_holder; holder != kNone;) {
        const int32_t next = holders[holder].next;
        const int32_t length = holders[holder].length;
        if (length > from) {
            unlink_holder(holder);
            attach(holder, new_run_at(length), length);
            if (holder == writer && length > upto) runs[tail].writer = holder;
        }
        holder = next;
    }
    for (int32_t child = runs[id].first_child; child != kNone;) {
        const int32_t next = runs[child].next_sibling;
        const int32_t at = runs[child].start;
        if (at > from) {  // not matchable, since the run is not this far
            unlink_child(child);
            link_child(child, new_run_at(at));
            if (runs[child].is_live()) raise(runs[child].parent, at);
        }
        child = next;
    }
    deduplicated += page_index(upto - from);
    ++version;
    runs[id].committed = std::min(runs[id].committed, from);
    lower(id);
}

}  // namespace gpo_fast
