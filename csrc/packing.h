// A forest of token runs as one packed row in which every shared token stands once (gpo_fast.packing).
//
// A node's tokens stay together as one *run*. Its children follow it, those from the deepest branch point first, each
// with its own subtree. In that order (depth-first, a run's own continuation being the first child of each of its
// tokens) the descendants of a token are the positions from its own up to `subtree_end`, without a gap:
//
//     prompt p0 p1 p2; trajectory a from depth 3; branch b off a at depth 4; branch c off the prompt at depth 2
//
//     position      0  1  2  3  4  5  6  7
//     token         p0 p1 p2 a3 a4 b4 c2 c3
//     depth         0  1  2  3  4  4  2  3
//     subtree_end   8  8  6  6  5  6  8  8
//
// Key j is visible to query i exactly when j <= i < subtree_end[j].
//
// A token within a run is predicted by the position before it; the first token of a run by `before`. A row (a position
// with a loss) therefore has as targets the token behind it in its own run and the first tokens of the runs that
// branch off there, each distinct token once.
#pragma once

#include <cstdint>
#include <vector>

namespace gpo_fast {

// A node of the forest: depths of its first token and behind its last one. A parent comes before its children, and
// holds the token before a child's first one.
struct ForestNode {
    std::int64_t parent, start, end;  // parent -1: a prompt
};

struct PackedRun {
    std::int64_t start, end;  // positions; runs are in the order of their nodes
    std::int64_t before;      // position that predicts the first token, -1: none
    std::int64_t depth;       // of the first token
    std::int64_t node;
};

struct LossRange {
    std::int64_t start, end;  // positions within one run, in the order of the loss tokens
    std::int64_t sequence;
};

// Positions start <= p < end: as a span they attend to each other causally (a run, or a chain of runs without a
// branch); as subtree ends they all have the same one.
struct Span {
    std::int64_t start, end;
};
struct SubtreeEnd {
    std::int64_t start, end, subtree_end;
};

// Every query in [query_start, query_end) sees every key in [key_start, key_end).
struct Block {
    std::int64_t query_start, query_end, key_start, key_end;
};

// What a query sees is its own span up to itself and, once each, the blocks that it is in.
struct PackedLayout {
    std::vector<PackedRun> runs;  // without empty ones
    std::vector<Span> spans;      // they cover the row
    std::vector<Block> blocks;
    std::vector<SubtreeEnd> subtree_ends;  // they cover the row
    std::vector<std::int64_t> kept;        // places of the branches that have a loss; one is a sequence
    std::vector<LossRange> ranges;
    std::int64_t tokens = 0, losses = 0;
    std::int64_t padded_tokens = 0;  // of all branches' paths, each counted for each branch
};

// The tokens on the paths of `branches`, each once. Branch i has a loss from the depth loss_starts[i] to its end.
PackedLayout lay_out(const std::vector<ForestNode>& nodes, const std::vector<std::int64_t>& branches,
                     const std::vector<std::int64_t>& loss_starts);

// Arrays of N tokens, T loss tokens, and at most T rows and pairs.
struct PackedArrays {
    std::int64_t* input_ids;      // (N)
    std::int64_t* position_ids;   // (N)
    std::int32_t* subtree_end;    // (N)
    std::int64_t* rows;           // (R) ascending
    std::int64_t* row_offsets;    // (R + 1)
    std::int64_t* pair_targets;   // (K) row by row
    std::int64_t* pair_of_token;  // (T)
    std::int64_t* targets;        // (T)
    std::int64_t* sequence_ids;   // (T)
    std::int32_t* scratch;        // (N + 1)
};

struct PackedCounts {
    std::int64_t rows, pairs;
};

// `tokens[i]` are those of runs[i].
PackedCounts fill_packed_arrays(const PackedLayout& layout, const std::int32_t* const* tokens, const PackedArrays& out);

}  // namespace gpo_fast
