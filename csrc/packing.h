// Fills the arrays of a packed batch (gpo_fast.packing) in one pass over the tokens.
//
// The packed row of N tokens consists of runs, each the tokens of a node. A token within a run is predicted by the
// position before it; the first token of a run by `before`. A row (a position with a loss) therefore has as targets
// the token behind it in its own run and the first tokens of the runs that branch off there, each distinct token once.
#pragma once

#include <cstdint>

namespace gpo_fast {

struct PackedRun {
    std::int64_t start, end;  // positions; runs are in the order of their nodes
    std::int64_t before;      // position that predicts the first token, -1: none
    std::int64_t depth;       // of the first token
};

struct LossRange {
    std::int64_t start, end;  // positions within one run, in the order of the loss tokens
    std::int64_t sequence;
};

// Arrays of N tokens, T loss tokens (the lengths of all ranges), and at most T rows and pairs.
struct PackedArrays {
    std::int64_t* input_ids;      // (N)
    std::int64_t* position_ids;   // (N)
    std::int64_t* rows;           // (R) ascending
    std::int64_t* row_offsets;    // (R + 1)
    std::int64_t* pair_targets;   // (K) row by row
    std::int64_t* pair_of_token;  // (T)
    std::int64_t* targets;        // (T)
    std::int64_t* sequence_ids;   // (T)
};

struct PackedCounts {
    std::int64_t rows, pairs;
};

// `tokens[i]` are those of runs[i].
PackedCounts fill_packed_arrays(const PackedRun* runs, const std::int32_t* const* tokens, std::int64_t num_runs,
                                const LossRange* ranges, std::int64_t num_ranges, std::int64_t num_tokens,
                                const PackedArrays& out);

}  // namespace gpo_fast
