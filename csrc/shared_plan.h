// SharedPlan: which keys a batch of sequences shares, as the arrays that forest attention reads.
//
//   four sequences:  prompt ── trajectory ─┬─ a          groups:  prompt      rows a b c d
//                      │                   └─ b                   trajectory  rows a b
//                      ├─ c                               tails:  what is left of each
//                      └─ d
//
// A group is a longest stretch of full pages that one and the same set of two or more sequences share. Every key of
// every sequence is in just one of its groups or in its tail.
#pragma once

#include <cstdint>
#include <vector>

#include "run_tree.h"

namespace gpo_fast {

// Arrays in compressed-row form: of group g, pages[page_offsets[g] .. page_offsets[g + 1]), and so on.
struct SharedPlan {
    int64_t version = 0;
    std::vector<int32_t> group_starts;   // [G] position of a group's first token
    std::vector<int32_t> group_lengths;  // [G] tokens, a multiple of block_size
    std::vector<int32_t> page_offsets;   // [G + 1]
    std::vector<int32_t> pages;          // the pages of each group, in order
    std::vector<int32_t> row_offsets;    // [G + 1]
    std::vector<int32_t> rows;           // the sequences of each group, ascending
    std::vector<int32_t> tail_starts;    // [N] position from which on the tokens are the sequence's own
    std::vector<int32_t> tail_offsets;   // [N + 1]
    std::vector<int32_t> tail_pages;     // the pages of each tail, in order

    bool same_arrays(const SharedPlan& other) const;
};

// Builds plans; keeps its scratch memory between calls.
class SharedPlanner {
  public:
    SharedPlan build(RunTree& tree, const std::vector<int32_t>& holders);

  private:
    // A run that a sequence of the batch passes.
    struct Node {
        int32_t run;
        int32_t parent = kNone;
        int32_t rows = 0;                              // sequences at or below it
        int32_t first_child = kNone, sibling = kNone;  // runs below it
        int32_t first_row = kNone;                     // sequences that end in it
    };
    // Where rows leave a run: a sequence ends there, or another run begins.
    struct Exit {
        int32_t position;
        int32_t row;   // kNone: a child
        int32_t node;  // the child's node
    };

    void reserve_plan(size_t rows);
    int32_t node_of(RunTree& tree, int32_t run);
    void add_row(RunTree& tree, const Holder& holder, int32_t row);
    void count_rows();
    void visit(const RunTree& tree, int32_t node, int32_t group);
    void push_exits(const RunTree& tree, const Node& node);
    int32_t share(const RunTree& tree, const Run& run, int32_t begin, int32_t end, int32_t rows, int32_t above);
    int32_t leave(const RunTree& tree, Exit exit, int32_t group);
    void fill_rows();
    void fill_tails(const RunTree& tree, const std::vector<int32_t>& holders);

    uint32_t stamp_ = 0;
    size_t last_groups_ = 0, last_pages_ = 0;
    std::vector<Node> nodes_;
    std::vector<int32_t> climbs_;  // per way up from a sequence: its first new node
    std::vector<int32_t> roots_;
    std::vector<int32_t> next_row_;     // per row: the next that ends in the same run
    std::vector<int32_t> row_length_;   // per row: its tokens
    std::vector<int32_t> row_group_;    // per row: its innermost group
    std::vector<int32_t> group_above_;  // per group
    std::vector<int32_t> group_rows_;   // per group: how many
    std::vector<Exit> exits_;           // a stack, shared by the visits that are open
    SharedPlan plan_;
};

}  // namespace gpo_fast
