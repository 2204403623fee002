// RunTree: the token runs of all sequences, the pages they fill, who holds them, and which may be evicted.
//
// A *run* is a stretch of consecutive tokens and the KV pages that hold their keys and values. It starts on a page
// boundary and hangs from a parent run, anywhere on the parent; what stands before its start is the parent's.
//
//   root
//   └─ run A: positions 0..63, pages 3 7 9 4              a prompt and its first answer
//      ├─ run B: positions 32..90, pages 5 6 1 8           another answer; shares pages 3 and 7 with A
//      └─ run C: positions 48..50, page 2                  a third; its first page repeats some of page 4's tokens
//
// Runs are never split: matching and forking in the middle of a run leave it as it is, and a page belongs to one run.
//
// A *holder* (sequence, mark, pin, pending copy) stands at a position of one run and keeps alive all that is above it.
// A run therefore needs just one number, `lock`: the highest position at which a holder, or a child run with a holder
// below it, stands. Holding a prefix of any length costs one entry per run on the path, never one per page.
//
//   start            lock            committed       end
//     |---- live -----|---- cached ------|
//     |---- matchable -------------------|-- private --|     (private tokens exist below `lock` only)
//
// Cached pages are evicted from the end of a run backwards, the longest unused run first.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace gpo_fast {

constexpr int32_t kNone = -1;

enum class HolderKind : uint8_t { kFree, kSequence, kMark, kPin, kCopy };

struct Holder {
    int32_t run = kNone;
    int32_t length = 0;    // tokens held: run's start < length <= run's end; 0 only at a root
    int32_t next = kNone;  // neighbours in the run's list of holders
    int32_t previous = kNone;
    uint32_t generation = 0;
    uint32_t call = 0;     // the last call that named it, to find one named twice
    int32_t reserved = 0;  // free pages set aside for tokens to come
    int32_t priority = 0;  // of a pin
    HolderKind kind = HolderKind::kFree;
};

struct ChildEntry {
    int32_t start;
    int32_t run;
};

struct Run {
    // What matching and writing touch comes first.
    std::vector<int32_t> tokens;
    std::vector<int32_t> pages;
    int32_t parent = kNone;  // kNone: a root, which has no tokens
    int32_t start = 0;
    int32_t lock = 0;               // held up to here; == start: not held
    int32_t writer = kNone;         // the sequence that may write at the end
    int32_t committed = 0;          // matchable up to here
    std::vector<ChildEntry> index;  // matchable children by start, then by the tokens of their first page
    int32_t first_holder = kNone;
    int32_t first_child = kNone;  // all child runs, in no order
    int32_t next_sibling = kNone, previous_sibling = kNone;
    int32_t cached = 0;                          // pages at the end that no one holds
    int32_t hot = 0;                             // used up to here since its tail was last used (see evict)
    int32_t newer = kNone, older = kNone;        // neighbours in the list of evictable runs
    int32_t copy_sources = 0, copy_targets = 0;  // pending copies out of and into its pages
    uint32_t plan_stamp = 0;                     // scratch of SharedPlanner
    int32_t plan_node = 0;
    bool listed = false;   // in the list of evictable runs
    bool indexed = false;  // in the parent's index
    int64_t epoch = 0;
    int64_t name_space = 0;

    int32_t end() const { return start + static_cast<int32_t>(tokens.size()); }
    bool is_root() const { return parent == kNone; }
    bool is_live() const { return lock > start; }
};

struct Place {
    int32_t run;
    int32_t position;
};

class RunTree {
  public:
    RunTree(int32_t num_blocks, int32_t block_size);

    // Where the longest matchable prefix of `tokens` ends, at most `limit` tokens. Changes nothing.
    Place match(int64_t name_space, const int32_t* tokens, int32_t limit) const;
    // The root of a namespace in this epoch; made when first asked for.
    int32_t root(int64_t name_space);
    // The run on the path to `run` that holds token `position - 1`; the root for position 0.
    int32_t run_at(int32_t run, int32_t position) const;

    int32_t new_holder(HolderKind kind);
    void attach(int32_t holder, int32_t run, int32_t position);
    // `count` new holders of a kind at one place, their handles written to `handles`.
    void attach_new(HolderKind kind, int32_t run, int32_t position, int32_t count, int64_t* handles);
    void detach(int32_t holder);
    void free_holder(int32_t holder);
    int64_t handle_of(int32_t holder) const { return (int64_t{holders[holder].generation} << 32) | holder; }
    void move(int32_t holder, int32_t run, int32_t position);

    // Whether the holder may write behind its last token in place, no one else having written there.
    bool may_extend(int32_t holder) const;
    // Appends tokens at the holder's end, in place. Pages come from the free ones: the caller makes sure of them.
    void extend(int32_t holder, const int32_t* tokens, int32_t count, int32_t* slots);
    // Appends tokens in a new run that repeats the used part of the holder's last page.
    void branch(int32_t holder, const int32_t* tokens, int32_t count, int32_t* slots);

    // Makes a holder's tokens matchable; full pages that are matchable already are replaced by those.
    void commit(int32_t holder);
    int32_t evict(int32_t count);
    void begin_epoch(int64_t version);

    void copy_tokens(int32_t run, int32_t length, int32_t* tokens) const;
    void copy_pages(int32_t run, int32_t length, int32_t* pages) const;
    void check_integrity() const;
    std::string dump() const;
    std::string dot() const;
    int64_t bookkeeping_bytes() const;  // all but the token ids

    int32_t page_index(int32_t position) const { return shift_ < 0 ? position / block_size : position >> shift_; }
    int32_t page_start(int32_t position) const { return page_index(position) * block_size; }
    int32_t page_offset(int32_t position) const { return position - page_start(position); }
    int32_t pages_for(int32_t tokens) const { return page_index(tokens + block_size - 1); }

    const int32_t num_blocks, block_size;
    int64_t epoch = 0;
    int64_t version = 0;  // grows when the pages of any handle change
    int64_t cached = 0, stale = 0, evicted = 0, deduplicated = 0;
    std::vector<int32_t> free_pages;
    std::vector<Run> runs;
    std::vector<int32_t> free_runs;
    std::vector<Holder> holders;
    std::vector<int32_t> free_holders;

  private:
    struct List {
        int32_t oldest = kNone, newest = kNone;
    };
    struct Candidate {
        int32_t run;
        int32_t match;
    };

    Place walk(Place from, const int32_t* tokens, int32_t first, int32_t limit) const;
    Candidate best_child(const Run& parent, int32_t start, const int32_t* tokens, int32_t count) const;
    std::vector<ChildEntry>::const_iterator index_position(const Run& parent, int32_t start, const int32_t* tokens,
                                                           int32_t count) const;
    int32_t new_run(int32_t parent, int32_t start);
    int32_t take_run_slot();
    void remove_run(int32_t run);
    void drop_unused_root(int32_t run);
    void link_child(int32_t run, int32_t parent);
    void unlink_child(int32_t run);
    void link_holder(int32_t holder, int32_t run, int32_t position);
    void unlink_holder(int32_t holder);
    void add_to_index(int32_t run);
    void remove_from_index(int32_t run);

    void raise(int32_t run, int32_t position);
    void lower(int32_t run);
    int32_t highest_hold(const Run& run) const;
    void settle(int32_t run);
    void shrink(Run& run, int32_t end);
    void count_cached(int32_t run);
    List& list_of(const Run& run) { return run.epoch == epoch ? fresh_ : stale_; }
    void push_newest(int32_t run);
    void unlist(int32_t run);
    void write(Run& run, const int32_t* tokens, int32_t count, int32_t* slots);

    void check_run(const Run& run) const;
    int64_t check_holders(int32_t run) const;
    void check_children(int32_t run) const;
    void check_index(int32_t run) const;
    int64_t check_list(const List& list, bool fresh) const;
    std::string describe(const Run& run) const;
    std::string describe_holders(const Run& run) const;

    bool commit_run(int32_t run, int32_t position);
    void merge(int32_t run, int32_t from, int32_t twin, int32_t position);

    int32_t shift_ = -1;  // log2 of block_size where it has one: divisions are what the hot paths would spend time on
    List fresh_, stale_;  // runs with cached pages, of this epoch and of older ones
    std::unordered_map<int64_t, int32_t> roots_;
};

}  // namespace gpo_fast
