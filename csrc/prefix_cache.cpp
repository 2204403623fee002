#include "prefix_cache.h"

#include <algorithm>

namespace gpo_fast {

namespace {

const char* name_of(HolderKind kind) {
    switch (kind) {
        case HolderKind::kSequence:
            return "sequence";
        case HolderKind::kMark:
            return "mark";
        case HolderKind::kPin:
            return "pin";
        case HolderKind::kCopy:
            return "pending copy";
        case HolderKind::kFree:
            break;
    }
    return "released handle";
}

}  // namespace

// -- handles ----------------------------------------------------------------------------------------------------

int32_t PrefixCache::find(int64_t handle) const {
    const int64_t index = handle & 0xffffffff;
    if (handle >= 0 && index < static_cast<int64_t>(tree_.holders.size())) {
        const Holder& holder = tree_.holders[index];
        const bool given_out = holder.kind != HolderKind::kFree && holder.kind != HolderKind::kCopy;
        if (given_out && holder.generation == static_cast<uint32_t>(handle >> 32)) return static_cast<int32_t>(index);
    }
    throw std::invalid_argument("no live sequence has the handle " + std::to_string(handle) +
                                ": it was released or never opened");
}

int32_t PrefixCache::find_sequence(int64_t handle) const {
    const int32_t holder = find(handle);
    const HolderKind kind = tree_.holders[holder].kind;
    if (kind != HolderKind::kSequence) {
        throw std::invalid_argument("handle " + std::to_string(handle) + " is a " + name_of(kind) +
                                    ", and a sequence is needed here: fork one from it");
    }
    return holder;
}

// A sequence or mark that has `position` tokens.
int32_t PrefixCache::find_source(int64_t handle, int32_t position) const {
    const int32_t holder = find(handle);
    if (position < 0 || position > tree_.holders[holder].length) {
        throw std::invalid_argument("position " + std::to_string(position) + " is not within the " +
                                    std::to_string(tree_.holders[holder].length) + " tokens of handle " +
                                    std::to_string(handle));
    }
    return holder;
}

void PrefixCache::name_once(int32_t holder) {
    if (tree_.holders[holder].call == call_) {
        throw std::invalid_argument("handle " + std::to_string(tree_.handle_of(holder)) +
                                    " is named twice in one call");
    }
    tree_.holders[holder].call = call_;
}

void PrefixCache::require_sizes(Handles handles, Counts counts, const char* what) {
    if (counts.one_for_all || counts.size == handles.size) return;
    throw std::invalid_argument("one " + std::string(what) + " is needed for each of " + std::to_string(handles.size) +
                                " handles, got " + std::to_string(counts.size));
}

void PrefixCache::hold_at(HolderKind kind, int64_t source, int32_t position, int32_t count, int64_t* handles) {
    const int32_t run = tree_.run_at(tree_.holders[find(source)].run, position);
    tree_.attach_new(kind, run, position, count, handles);
    counts_[static_cast<int>(kind)] += count;
}

void PrefixCache::let_go(int32_t id) {
    Holder& holder = tree_.holders[id];
    --counts_[static_cast<int>(holder.kind)];
    reserved_ -= holder.reserved;
    holder.reserved = 0;
    tree_.detach(id);
    tree_.free_holder(id);
    ++tree_.version;
}

// -- sequences --------------------------------------------------------------------------------------------------

std::pair<int64_t, int32_t> PrefixCache::open(const int32_t* tokens, int64_t count, int64_t name_space) {
    if (count < 1) throw std::invalid_argument("open needs at least one token");
    if (count > INT32_MAX) throw std::invalid_argument("a sequence has less than 2^31 tokens");
    const Lock lock(mutex_);
    Place place = tree_.match(name_space, tokens, static_cast<int32_t>(count) - 1);  // the last one's logits are needed
    if (place.run == kNone) place.run = tree_.root(name_space);
    const int32_t holder = tree_.new_holder(HolderKind::kSequence);
    tree_.attach(holder, place.run, place.position);
    ++counts_[static_cast<int>(HolderKind::kSequence)];
    hit_tokens_ += place.position;
    opened_tokens_ += count;
    return {tree_.handle_of(holder), place.position};
}

void PrefixCache::fork(Handles sources, Counts positions, Counts counts, int64_t* forks) {
    const Lock lock(mutex_);
    require_sizes(sources, positions, "position");
    for (size_t i = 0; i < sources.size; ++i) find_source(sources[i], positions[i]);
    for (size_t i = 0; i < sources.size; forks += counts[i++]) {
        hold_at(HolderKind::kSequence, sources[i], positions[i], counts[i], forks);
    }
}

void PrefixCache::mark(Handles sources, Counts positions, int64_t* marks) {
    const Lock lock(mutex_);
    require_sizes(sources, positions, "position");
    for (size_t i = 0; i < sources.size; ++i) find_source(sources[i], positions[i]);
    for (size_t i = 0; i < sources.size; ++i) hold_at(HolderKind::kMark, sources[i], positions[i], 1, marks + i);
}

int64_t PrefixCache::number_of_forks(Handles sources, Counts counts) {
    require_sizes(sources, counts, "number of forks");
    int64_t total = 0;
    for (size_t i = 0; i < sources.size; ++i) {
        if (counts[i] < 0) throw std::invalid_argument("cannot make " + std::to_string(counts[i]) + " forks");
        total += counts[i];
    }
    return total;
}

void PrefixCache::release(Handles handles) {
    const Lock lock(mutex_);
    begin_call();
    for (size_t i = 0; i < handles.size; ++i) {
        const int32_t holder = find(handles[i]);
        if (tree_.holders[holder].kind == HolderKind::kPin) {
            throw std::invalid_argument("handle " + std::to_string(handles[i]) + " is a pin: use unpin");
        }
        name_once(holder);
    }
    for (size_t i = 0; i < handles.size; ++i) let_go(find(handles[i]));
}

void PrefixCache::truncate(int64_t sequence, int32_t length) {
    const Lock lock(mutex_);
    find_source(sequence, length);
    const int32_t holder = find_sequence(sequence);
    tree_.move(holder, tree_.run_at(tree_.holders[holder].run, length), length);
    ++tree_.version;
}

void PrefixCache::commit(Handles sequences) {
    const Lock lock(mutex_);
    for (size_t i = 0; i < sequences.size; ++i) refuse_pending_copies(find_sequence(sequences[i]));
    for (size_t i = 0; i < sequences.size; ++i) {
        const int32_t holder = find(sequences[i]);
        if (tree_.runs[tree_.holders[holder].run].epoch == tree_.epoch) tree_.commit(holder);
    }
}

void PrefixCache::refuse_pending_copies(int32_t holder) const {
    int32_t end = tree_.holders[holder].length;
    for (int32_t id = tree_.holders[holder].run; id != kNone; end = tree_.runs[id].start, id = tree_.runs[id].parent) {
        if (tree_.runs[id].copy_targets > 0 && tree_.runs[id].committed < end) {
            throw std::invalid_argument("sequence " + std::to_string(tree_.handle_of(holder)) +
                                        " waits for a copy: perform the copies and acknowledge them before commit");
        }
    }
}

void PrefixCache::begin_epoch(int64_t version) {
    const Lock lock(mutex_);
    if (version <= tree_.epoch) {
        throw std::invalid_argument("an epoch's version must be above the last one, " + std::to_string(tree_.epoch) +
                                    ", got " + std::to_string(version));
    }
    while (!pins_.empty()) give_up_pin(pins_.begin()->second);
    tree_.begin_epoch(version);
}

// -- room -------------------------------------------------------------------------------------------------------

int32_t PrefixCache::pages_needed(int32_t id, int32_t count) {
    if (count == 0) return 0;
    const int32_t length = tree_.holders[id].length;
    const int32_t pages = tree_.pages_for(length + count);
    if (!tree_.may_extend(id)) return pages - tree_.page_index(length);
    Run& run = tree_.runs[tree_.holders[id].run];
    if (run.writer == kNone) {  // this sequence writes on here; the others know that they will need a copy
        run.writer = id;
        claimed_.push_back(tree_.holders[id].run);
    }
    return pages - tree_.pages_for(length);
}

// Fills batch_ and needed_. False, and no change, without room.
bool PrefixCache::set_aside(Handles sequences, Counts counts) {
    require_sizes(sequences, counts, "length");
    begin_call();
    batch_.clear();
    needed_.clear();
    claimed_.clear();
    for (size_t i = 0; i < sequences.size; ++i) {
        const int32_t holder = find_sequence(sequences[i]);
        name_once(holder);
        if (counts[i] < 0)
            throw std::invalid_argument("a length must not be negative, got " + std::to_string(counts[i]));
        if (int64_t{tree_.holders[holder].length} + counts[i] > INT32_MAX - tree_.block_size) {
            throw std::invalid_argument("a sequence has less than 2^31 tokens");
        }
        batch_.push_back(holder);
    }
    int64_t missing = 0;
    for (size_t i = 0; i < batch_.size(); ++i) {
        needed_.push_back(pages_needed(batch_[i], counts[i]));
        missing += std::max(0, needed_[i] - tree_.holders[batch_[i]].reserved);
    }
    if (missing == 0) return true;
    const int64_t free = static_cast<int64_t>(tree_.free_pages.size()) - reserved_;
    if (missing > free + tree_.cached) {
        for (const int32_t run : claimed_) tree_.runs[run].writer = kNone;
        return false;
    }
    if (missing > free) tree_.evict(static_cast<int32_t>(missing - free));
    for (size_t i = 0; i < batch_.size(); ++i) {
        Holder& holder = tree_.holders[batch_[i]];
        holder.reserved = std::max(holder.reserved, needed_[i]);
    }
    reserved_ += missing;
    return true;
}

bool PrefixCache::reserve(Handles sequences, Counts counts) {
    const Lock lock(mutex_);
    return set_aside(sequences, counts);
}

void PrefixCache::append(Handles sequences, const int32_t* tokens, int64_t num_tokens, Counts counts, int32_t* slots) {
    const Lock lock(mutex_);
    require_sizes(sequences, counts, "length");
    int64_t total = 0;
    for (size_t i = 0; i < sequences.size; ++i) total += counts[i];
    if (total != num_tokens) {
        throw std::invalid_argument("lengths add up to " + std::to_string(total) + ", but " +
                                    std::to_string(num_tokens) + " tokens came");
    }
    if (!set_aside(sequences, counts)) {
        throw OutOfBlocks("no free KV block is left: reserve() says so without an error");
    }
    for (size_t i = 0; i < batch_.size(); ++i) {
        const int32_t count = counts[i];
        if (count == 0) continue;
        const int32_t holder = batch_[i];
        if (tree_.may_extend(holder)) {
            tree_.extend(holder, tokens, count, slots);
        } else {
            branch(holder, tokens, count, slots);
        }
        tree_.holders[holder].reserved -= needed_[i];
        reserved_ -= needed_[i];
        tokens += count;
        slots += count;
    }
}

// Goes on in a page of the sequence's own; the used slots of the old one are to be copied.
void PrefixCache::branch(int32_t holder, const int32_t* tokens, int32_t count, int32_t* slots) {
    const Place from{tree_.holders[holder].run, tree_.holders[holder].length};
    const int32_t used = tree_.page_offset(from.position);
    if (used == 0) return tree_.branch(holder, tokens, count, slots);
    int32_t page;
    const Place source = copy_source(from, page);
    const int32_t source_holder = tree_.new_holder(HolderKind::kCopy);
    tree_.attach(source_holder, source.run, source.position);
    ++tree_.runs[source.run].copy_sources;
    tree_.branch(holder, tokens, count, slots);
    const int32_t target = tree_.holders[holder].run;
    const int32_t target_holder = tree_.new_holder(HolderKind::kCopy);
    tree_.attach(target_holder, target, from.position);
    ++tree_.runs[target].copy_targets;
    const int32_t size = tree_.block_size;
    copies_.push_back({{page * size, tree_.runs[target].pages[0] * size, used}, source_holder, target_holder});
    ++num_copies_;
}

// Where to copy a place's last page from: its own page, or that page's source if it is itself still to be copied.
Place PrefixCache::copy_source(Place from, int32_t& page) const {
    const Run& run = tree_.runs[from.run];
    const int32_t used = tree_.page_offset(from.position);
    page = run.pages[tree_.page_index(from.position - run.start)];
    if (run.copy_targets == 0) return from;
    for (const PendingCopy& copy : copies_) {
        if (copy.job.target_slot != page * tree_.block_size || copy.job.length < used) continue;
        page = copy.job.source_slot / tree_.block_size;
        return {tree_.holders[copy.source_holder].run, from.position};
    }
    return from;
}

std::vector<CopyJob> PrefixCache::take_copies() {
    const Lock lock(mutex_);
    std::vector<CopyJob> jobs;
    for (; taken_ < copies_.size(); ++taken_) jobs.push_back(copies_[taken_].job);
    return jobs;
}

void PrefixCache::acknowledge_copies() {
    const Lock lock(mutex_);
    if (taken_ < copies_.size()) throw std::invalid_argument("copies are acknowledged before they were taken");
    for (const PendingCopy& copy : copies_) {
        --tree_.runs[tree_.holders[copy.source_holder].run].copy_sources;
        --tree_.runs[tree_.holders[copy.target_holder].run].copy_targets;
        for (const int32_t holder : {copy.source_holder, copy.target_holder}) {
            tree_.detach(holder);
            tree_.free_holder(holder);
        }
    }
    copies_.clear();
    taken_ = 0;
}

// -- eviction ---------------------------------------------------------------------------------------------------

int64_t PrefixCache::pin(int64_t source, int32_t priority, int32_t position) {
    const Lock lock(mutex_);
    if (position < 0) position = tree_.holders[find(source)].length;
    find_source(source, position);
    int64_t handle;
    hold_at(HolderKind::kPin, source, position, 1, &handle);
    const int32_t holder = find(handle);
    tree_.holders[holder].priority = priority;
    pins_.insert({priority, holder});
    return handle;
}

void PrefixCache::unpin(int64_t pin) {
    const Lock lock(mutex_);
    const int32_t holder = find(pin);
    const HolderKind kind = tree_.holders[holder].kind;
    if (kind != HolderKind::kPin) {
        throw std::invalid_argument("handle " + std::to_string(pin) + " is a " + name_of(kind) + ", not a pin");
    }
    pins_.erase({tree_.holders[holder].priority, holder});
    let_go(holder);
}

// The handle stays good for unpin, but keeps nothing any more.
void PrefixCache::give_up_pin(int32_t pin) {
    pins_.erase({tree_.holders[pin].priority, pin});
    tree_.move(pin, tree_.run_at(tree_.holders[pin].run, 0), 0);
    ++tree_.version;
}

int32_t PrefixCache::evict(int32_t count, int32_t priority) {
    if (count < 0) throw std::invalid_argument("cannot evict " + std::to_string(count) + " pages");
    const Lock lock(mutex_);
    int32_t done = tree_.evict(count);
    while (done < count && !pins_.empty() && pins_.begin()->first < priority) {
        give_up_pin(pins_.begin()->second);
        done += tree_.evict(count - done);
    }
    return done;
}

// -- reading ----------------------------------------------------------------------------------------------------

int32_t PrefixCache::length(int64_t handle) const {
    const Lock lock(mutex_);
    return tree_.holders[find(handle)].length;
}

std::vector<int32_t> PrefixCache::tokens(int64_t handle) const {
    const Lock lock(mutex_);
    const Holder& holder = tree_.holders[find(handle)];
    std::vector<int32_t> tokens(holder.length);
    tree_.copy_tokens(holder.run, holder.length, tokens.data());
    return tokens;
}

std::vector<int32_t> PrefixCache::pages(int64_t handle) const {
    const Lock lock(mutex_);
    const Holder& holder = tree_.holders[find(handle)];
    std::vector<int32_t> pages(tree_.pages_for(holder.length));
    tree_.copy_pages(holder.run, holder.length, pages.data());
    return pages;
}

size_t PrefixCache::page_table(Handles handles, std::vector<int32_t>& table) const {
    const Lock lock(mutex_);
    int32_t width = 1;
    for (size_t i = 0; i < handles.size; ++i) {
        width = std::max(width, tree_.pages_for(tree_.holders[find(handles[i])].length));
    }
    table.assign(handles.size * width, 0);
    for (size_t i = 0; i < handles.size; ++i) {
        const Holder& holder = tree_.holders[find(handles[i])];
        tree_.copy_pages(holder.run, holder.length, table.data() + i * width);
    }
    return width;
}

std::shared_ptr<const SharedPlan> PrefixCache::plan(Handles handles) {
    const Lock lock(mutex_);
    if (plan_ && planned_version_ == tree_.version && planned_.size() == handles.size &&
        std::equal(planned_.begin(), planned_.end(), handles.data)) {
        return plan_;
    }
    batch_.clear();
    for (size_t i = 0; i < handles.size; ++i) batch_.push_back(find(handles[i]));
    SharedPlan built = planner_.build(tree_, batch_);
    planned_.assign(handles.data, handles.data + handles.size);
    planned_version_ = tree_.version;
    if (!plan_ || !plan_->same_arrays(built)) {
        built.version = plan_ ? plan_->version + 1 : 1;
        plan_ = std::make_shared<const SharedPlan>(std::move(built));
    }
    return plan_;
}

CacheStats PrefixCache::stats() const {
    const Lock lock(mutex_);
    CacheStats s{};
    s.num_blocks = tree_.num_blocks;
    s.free = static_cast<int64_t>(tree_.free_pages.size()) - reserved_;
    s.cached = tree_.cached;
    s.live = s.num_blocks - s.free - s.cached;
    s.stale = tree_.stale;
    s.reserved = reserved_;
    s.sequences = counts_[static_cast<int>(HolderKind::kSequence)];
    s.marks = counts_[static_cast<int>(HolderKind::kMark)];
    s.pins = counts_[static_cast<int>(HolderKind::kPin)];
    s.runs = static_cast<int64_t>(tree_.runs.size() - tree_.free_runs.size());
    s.hit_tokens = hit_tokens_;
    s.opened_tokens = opened_tokens_;
    s.evicted = tree_.evicted;
    s.copies = num_copies_;
    s.deduplicated = tree_.deduplicated;
    s.epoch = tree_.epoch;
    return s;
}

int64_t PrefixCache::bookkeeping_bytes() const {
    const Lock lock(mutex_);
    return tree_.bookkeeping_bytes();
}

void PrefixCache::check_integrity() const {
    const Lock lock(mutex_);
    tree_.check_integrity();
    const auto require = [](bool condition, const char* invariant) {
        if (!condition) throw std::logic_error(std::string("broken invariant: ") + invariant);
    };
    int64_t reserved = 0;
    int64_t counted[5] = {};
    for (const Holder& holder : tree_.holders) {
        ++counted[static_cast<int>(holder.kind)];
        require(holder.reserved >= 0, "no sequence has taken more pages than it reserved");
        require(holder.kind == HolderKind::kSequence || holder.reserved == 0, "only sequences reserve pages");
        reserved += holder.reserved;
    }
    require(reserved == reserved_, "reserved pages add up");
    require(reserved_ <= static_cast<int64_t>(tree_.free_pages.size()), "reserved pages are free pages");
    for (const HolderKind kind : {HolderKind::kSequence, HolderKind::kMark, HolderKind::kPin}) {
        require(counted[static_cast<int>(kind)] == counts_[static_cast<int>(kind)], "holders are counted by kind");
    }
    require(counted[static_cast<int>(HolderKind::kCopy)] == static_cast<int64_t>(2 * copies_.size()),
            "a pending copy holds its source and its target");
}

std::string PrefixCache::snapshot(bool graphviz) const {
    const Lock lock(mutex_);
    return graphviz ? tree_.dot() : tree_.dump();
}

}  // namespace gpo_fast
