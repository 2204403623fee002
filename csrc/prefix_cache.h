// PrefixCache: which KV pages hold which tokens, for sequences that branch anywhere.
//
// The pool has `num_blocks` pages of `block_size` tokens. Sequences, marks and pins are positions in a tree of token
// runs (run_tree.h); this class gives them out as handles, sets pages aside for tokens to come, lists the copies that
// branching within a page needs, and checks all arguments: a call that throws has changed nothing.
//
// A page is written in place only behind its last used slot, and only by one sequence; any other that wants to go on
// from there gets a page of its own, with the used slots copied. The caller
//   1. performs the copies that `take_copies` lists before it writes the slots that `append` gave, in the order
//      listed, and acknowledges them; until then their sources and targets are kept;
//   2. forks within a sequence's last page, and commits, only what it has computed.
//
// All calls may come from several threads: a mutex lets one in at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "run_tree.h"
#include "shared_plan.h"

namespace gpo_fast {

struct OutOfBlocks : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct CopyJob {
    int32_t source_slot;
    int32_t target_slot;
    int32_t length;
};

struct CacheStats {
    int64_t num_blocks;
    int64_t free, cached, live;  // pages; they add up to num_blocks. Pages set aside by reserve are live
    int64_t stale, reserved;     // of the cached pages: of older epochs; of the live ones: set aside
    int64_t sequences, marks, pins, runs;
    int64_t hit_tokens, opened_tokens, evicted, copies, deduplicated, epoch;
};

// Arguments of batched calls: `size` values, or one for all.
template <typename T>
struct Values {
    const T* data;
    size_t size;
    bool one_for_all = false;
    T operator[](size_t i) const { return data[one_for_all ? 0 : i]; }
};
using Handles = Values<int64_t>;
using Counts = Values<int32_t>;

class PrefixCache {
  public:
    PrefixCache(int32_t num_blocks, int32_t block_size) : tree_(num_blocks, block_size) {}

    // Nothing committed before can match from now on. Its pages are the first to be evicted. Pins are given up.
    void begin_epoch(int64_t version);

    // A sequence that holds the longest committed prefix of `tokens`, at most all but the last token.
    std::pair<int64_t, int32_t> open(const int32_t* tokens, int64_t count, int64_t name_space);

    // Makes sure that sequence i can take counts[i] more tokens, evicting cached pages. All or nothing.
    bool reserve(Handles sequences, Counts counts);

    // Slots (page * block_size + offset) of the new tokens. Throws OutOfBlocks without room.
    void append(Handles sequences, const int32_t* tokens, int64_t num_tokens, Counts counts, int32_t* slots);

    // counts[i] new sequences that share the first positions[i] tokens of sequence or mark i.
    void fork(Handles sources, Counts positions, Counts counts, int64_t* forks);
    // How many those are.
    static int64_t number_of_forks(Handles sources, Counts counts);
    // A mark at each position, to fork from later.
    void mark(Handles sources, Counts positions, int64_t* marks);

    // Makes the sequences' tokens matchable. A sequence of an older epoch stays private.
    void commit(Handles sequences);
    void truncate(int64_t sequence, int32_t length);
    void release(Handles handles);

    // Keeps the first `position` tokens (negative: all) of a sequence or mark until unpin, begin_epoch, or an evict
    // with a higher priority.
    int64_t pin(int64_t source, int32_t priority, int32_t position);
    void unpin(int64_t pin);

    // Copy-on-write jobs since the last call.
    std::vector<CopyJob> take_copies();
    void acknowledge_copies();

    // Frees up to `count` cached pages. Pins of a lower priority than `priority` are given up, lowest first, if there
    // are not enough others.
    int32_t evict(int32_t count, int32_t priority);

    int32_t length(int64_t handle) const;
    std::vector<int32_t> tokens(int64_t handle) const;
    std::vector<int32_t> pages(int64_t handle) const;
    // Rows of pages padded with zeros to the longest row, at least one wide; returns the width.
    size_t page_table(Handles handles, std::vector<int32_t>& table) const;
    int32_t block_size() const { return tree_.block_size; }
    CacheStats stats() const;
    int64_t bookkeeping_bytes() const;

    // What the sequences share. The same object until an array changes.
    std::shared_ptr<const SharedPlan> plan(Handles handles);

    // Throws std::logic_error naming the invariant that does not hold.
    void check_integrity() const;
    std::string snapshot(bool graphviz) const;

  private:
    struct PendingCopy {
        CopyJob job;
        int32_t source_holder, target_holder;
    };
    using Lock = std::lock_guard<std::mutex>;

    int32_t find(int64_t handle) const;
    int32_t find_sequence(int64_t handle) const;
    int32_t find_source(int64_t handle, int32_t position) const;
    static void require_sizes(Handles handles, Counts counts, const char* what);
    void begin_call() { ++call_; }
    void name_once(int32_t holder);
    bool set_aside(Handles sequences, Counts counts);
    int32_t pages_needed(int32_t holder, int32_t count);
    void branch(int32_t holder, const int32_t* tokens, int32_t count, int32_t* slots);
    Place copy_source(Place from, int32_t& page) const;
    void refuse_pending_copies(int32_t holder) const;
    void hold_at(HolderKind kind, int64_t source, int32_t position, int32_t count, int64_t* handles);
    void let_go(int32_t holder);
    void give_up_pin(int32_t pin);

    mutable std::mutex mutex_;
    RunTree tree_;
    SharedPlanner planner_;
    uint32_t call_ = 0;
    int64_t reserved_ = 0;             // free pages set aside
    std::vector<int32_t> batch_;       // scratch: the holders of a call
    std::vector<int32_t> needed_;      // scratch: the pages that each needs
    std::vector<int32_t> claimed_;     // scratch: runs whose end this call claims
    std::vector<PendingCopy> copies_;  // not acknowledged yet; the first `taken_` have been handed out
    size_t taken_ = 0;
    std::set<std::pair<int32_t, int32_t>> pins_;  // priority, holder: those that hold something
    int64_t counts_[5] = {};                      // holders by kind
    std::vector<int64_t> planned_;                // handles of the last plan
    int64_t planned_version_ = -1;
    std::shared_ptr<const SharedPlan> plan_;
    int64_t hit_tokens_ = 0, opened_tokens_ = 0, num_copies_ = 0;
};

}  // namespace gpo_fast
