#include "packing.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <tuple>
#include <vector>

namespace gpo_fast {

namespace {

// The first token of a run, as a target of the row `row`.
struct Head {
    std::int64_t row, token, position;
    bool operator<(const Head& other) const { return std::tie(row, token) < std::tie(other.row, other.token); }
};

}  // namespace

PackedCounts fill_packed_arrays(const PackedRun* runs, const std::int32_t* const* tokens, std::int64_t num_runs,
                                const LossRange* ranges, std::int64_t num_ranges, std::int64_t num_tokens,
                                const PackedArrays& out) {
    std::vector<std::uint8_t> wanted(num_tokens + 1);  // positions with a loss; none at the end
    for (std::int64_t i = 0; i < num_ranges; ++i)
        std::fill(wanted.begin() + ranges[i].start, wanted.begin() + ranges[i].end, 1);
    const std::unique_ptr<std::int32_t[]> pair_of_position(new std::int32_t[num_tokens]);  // of the wanted ones

    std::vector<Head> heads;
    std::vector<std::int64_t> by_position(num_runs);
    for (std::int64_t i = 0; i < num_runs; ++i) {
        const PackedRun& run = runs[i];
        std::copy(tokens[i], tokens[i] + (run.end - run.start), out.input_ids + run.start);
        std::iota(out.position_ids + run.start, out.position_ids + run.end, run.depth);
        if (wanted[run.start]) heads.push_back({run.before, tokens[i][0], run.start});
    }
    std::sort(heads.begin(), heads.end());
    std::iota(by_position.begin(), by_position.end(), 0);
    std::sort(by_position.begin(), by_position.end(),
              [&](std::int64_t a, std::int64_t b) { return runs[a].start < runs[b].start; });

    PackedCounts counts{0, 0};
    auto head = heads.begin();
    for (const std::int64_t i : by_position) {
        const std::int64_t last = runs[i].end - 1;
        for (std::int64_t row = runs[i].start; row <= last; ++row) {
            // Up to the next row that a run branches off from, each row has its own run's next token or nothing.
            const std::int64_t plain = head == heads.end() ? last : std::min(last, head->row);
            for (; row < plain; ++row) {
                if (!wanted[row + 1]) continue;
                pair_of_position[row + 1] = static_cast<std::int32_t>(counts.pairs);
                out.rows[counts.rows] = row;
                out.row_offsets[counts.rows++] = counts.pairs;
                out.pair_targets[counts.pairs++] = out.input_ids[row + 1];
            }
            const std::int64_t first = counts.pairs;
            const bool goes_on = row < last && wanted[row + 1];
            if (goes_on) {
                pair_of_position[row + 1] = static_cast<std::int32_t>(counts.pairs);
                out.pair_targets[counts.pairs++] = out.input_ids[row + 1];
            }
            for (; head != heads.end() && head->row == row; ++head) {
                // Heads come sorted: an equal target is the run's own or the one before.
                std::int64_t pair = counts.pairs;
                if (goes_on && out.pair_targets[first] == head->token) {
                    pair = first;
                } else if (counts.pairs > first && out.pair_targets[counts.pairs - 1] == head->token) {
                    pair = counts.pairs - 1;
                } else {
                    out.pair_targets[counts.pairs++] = head->token;
                }
                pair_of_position[head->position] = static_cast<std::int32_t>(pair);
            }
            if (counts.pairs > first) {
                out.rows[counts.rows] = row;
                out.row_offsets[counts.rows++] = first;
            }
        }
    }
    out.row_offsets[counts.rows] = counts.pairs;

    std::int64_t token = 0;
    for (std::int64_t i = 0; i < num_ranges; ++i) {
        const LossRange& range = ranges[i];
        const std::int64_t count = range.end - range.start;
        std::copy_n(pair_of_position.get() + range.start, count, out.pair_of_token + token);
        std::copy_n(out.input_ids + range.start, count, out.targets + token);
        std::fill_n(out.sequence_ids + token, count, range.sequence);
        token += count;
    }
    return counts;
}

}  // namespace gpo_fast
