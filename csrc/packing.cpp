#include "packing.h"

#include <algorithm>
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

constexpr std::int32_t kWanted = -2;  // instead of its pair: a position with a loss

// For each node the depth up to which its tokens are needed, -1 for one that is on no branch's path.
std::vector<std::int64_t> needed_ends(const std::vector<ForestNode>& nodes, const std::vector<std::int64_t>& branches) {
    std::vector<std::int64_t> ends(nodes.size(), -1);
    for (const std::int64_t branch : branches) {
        std::int64_t end = nodes[branch].end;
        for (std::int64_t node = branch; node != -1 && ends[node] < end; node = nodes[node].parent) {
            ends[node] = end;
            end = nodes[node].start;
        }
    }
    return ends;
}

// The needed children of each node, from the deepest branch point on.
std::vector<std::vector<std::int64_t>> children_of(const std::vector<ForestNode>& nodes,
                                                   const std::vector<std::int64_t>& ends) {
    std::vector<std::vector<std::int64_t>> children(nodes.size());
    for (std::size_t i = 0; i < nodes.size(); ++i)
        if (ends[i] >= 0 && nodes[i].parent != -1) children[nodes[i].parent].push_back(static_cast<std::int64_t>(i));
    for (auto& own : children)
        std::stable_sort(own.begin(), own.end(),
                         [&](std::int64_t a, std::int64_t b) { return nodes[a].start > nodes[b].start; });
    return children;
}

// The runs, spans, blocks and subtree ends; gives the position of each node's first token.
std::vector<std::int64_t> place_runs(const std::vector<ForestNode>& nodes, const std::vector<std::int64_t>& branches,
                                     PackedLayout& layout) {
    const std::vector<std::int64_t> ends = needed_ends(nodes, branches);
    const auto children = children_of(nodes, ends);
    const auto count = static_cast<std::int64_t>(nodes.size());
    std::vector<std::int64_t> sizes(count), places(count), before(count, -1), span_of(count, -1);
    for (std::int64_t i = count - 1; i >= 0; --i) {
        if (ends[i] < 0) continue;
        sizes[i] += ends[i] - nodes[i].start;
        if (nodes[i].parent != -1) sizes[nodes[i].parent] += sizes[i];
    }
    std::vector<std::int64_t> block_span;  // for each block the span of its keys
    for (std::int64_t i = 0; i < count; ++i) {
        if (ends[i] < 0) continue;
        const ForestNode& node = nodes[i];
        if (node.parent == -1) {
            places[i] = layout.tokens;
            layout.tokens += sizes[i];
        }
        const std::int64_t start = places[i], end = start + ends[i] - node.start;
        if (start == end) continue;
        layout.runs.push_back({start, end, before[i], node.start, i});
        if (span_of[i] == -1) {
            span_of[i] = static_cast<std::int64_t>(layout.spans.size());
            layout.spans.push_back({start, end});
        }
        layout.spans[span_of[i]].end = end;

        std::int64_t free = end, unset = end;  // from the position `unset` on, subtree ends are there
        for (auto child = children[i].begin(); child != children[i].end();) {
            const std::int64_t at = nodes[*child].start, cut = start + at - node.start, first_query = free;
            if (cut < unset) layout.subtree_ends.push_back({cut, unset, free});
            unset = cut;
            for (; child != children[i].end() && nodes[*child].start == at; ++child) {
                places[*child] = free;
                before[*child] = cut - 1;
                if (free == cut) span_of[*child] = span_of[i];  // right behind the run's last token
                free += sizes[*child];
            }
            layout.blocks.push_back({first_query, free, start, cut});
            block_span.push_back(span_of[i]);
        }
        layout.subtree_ends.push_back({start, unset, free});
    }
    // Descendants that go on with the span see these keys in it.
    std::size_t kept = 0;
    for (std::size_t b = 0; b < layout.blocks.size(); ++b) {
        Block block = layout.blocks[b];
        block.query_start = std::max(block.query_start, layout.spans[block_span[b]].end);
        if (block.query_start < block.query_end) layout.blocks[kept++] = block;
    }
    layout.blocks.resize(kept);
    return places;
}

void find_losses(const std::vector<ForestNode>& nodes, const std::vector<std::int64_t>& branches,
                 const std::vector<std::int64_t>& loss_starts, const std::vector<std::int64_t>& places,
                 PackedLayout& layout) {
    for (std::size_t i = 0; i < branches.size(); ++i) {
        std::int64_t end = nodes[branches[i]].end;
        layout.padded_tokens += end;
        if (loss_starts[i] >= end) continue;
        const auto first = static_cast<std::ptrdiff_t>(layout.ranges.size());
        const auto sequence = static_cast<std::int64_t>(layout.kept.size());
        layout.kept.push_back(static_cast<std::int64_t>(i));
        layout.losses += end - loss_starts[i];
        for (std::int64_t node = branches[i]; node != -1 && end > loss_starts[i]; node = nodes[node].parent) {
            const std::int64_t begin = nodes[node].start, offset = places[node] - begin;
            if (end > begin)
                layout.ranges.push_back({std::max(begin, loss_starts[i]) + offset, end + offset, sequence});
            end = std::min(end, begin);
        }
        std::reverse(layout.ranges.begin() + first, layout.ranges.end());
    }
}

}  // namespace

PackedLayout lay_out(const std::vector<ForestNode>& nodes, const std::vector<std::int64_t>& branches,
                     const std::vector<std::int64_t>& loss_starts) {
    PackedLayout layout;
    const std::vector<std::int64_t> places = place_runs(nodes, branches, layout);
    find_losses(nodes, branches, loss_starts, places, layout);
    return layout;
}

namespace {

// Tokens, positions and subtree ends, and what each loss token is.
void fill_tokens(const PackedLayout& layout, const std::int32_t* const* tokens, const PackedArrays& out) {
    for (const SubtreeEnd& part : layout.subtree_ends)
        std::fill(out.subtree_end + part.start, out.subtree_end + part.end,
                  static_cast<std::int32_t>(part.subtree_end));
    for (const PackedRun& run : layout.runs) {
        std::copy(*tokens, *tokens + (run.end - run.start), out.input_ids + run.start);
        std::iota(out.position_ids + run.start, out.position_ids + run.end, run.depth);
        ++tokens;
    }
    std::int64_t token = 0;
    for (const LossRange& range : layout.ranges) {
        std::copy(out.input_ids + range.start, out.input_ids + range.end, out.targets + token);
        std::fill_n(out.sequence_ids + token, range.end - range.start, range.sequence);
        token += range.end - range.start;
    }
}

// Rows and their targets, and in `scratch` the pair that each position with a loss is.
PackedCounts fill_rows(const PackedLayout& layout, const std::int32_t* const* tokens, const PackedArrays& out) {
    const std::vector<PackedRun>& runs = layout.runs;
    const auto num_runs = static_cast<std::int64_t>(runs.size());
    std::int32_t* const pair_of_position = out.scratch;
    std::fill_n(pair_of_position, layout.tokens + 1, -1);  // no loss; none at the end
    for (const LossRange& range : layout.ranges)
        std::fill(pair_of_position + range.start, pair_of_position + range.end, kWanted);

    std::vector<Head> heads;
    std::vector<std::int64_t> by_position(num_runs);
    for (std::int64_t i = 0; i < num_runs; ++i) {
        if (pair_of_position[runs[i].start] == kWanted) heads.push_back({runs[i].before, *tokens[i], runs[i].start});
    }
    std::sort(heads.begin(), heads.end());
    std::iota(by_position.begin(), by_position.end(), 0);
    std::sort(by_position.begin(), by_position.end(),
              [&](std::int64_t a, std::int64_t b) { return runs[a].start < runs[b].start; });

    PackedCounts counts{0, 0};
    auto head = heads.begin();
    for (const std::int64_t i : by_position) {
        const std::int64_t last = runs[i].end - 1;
        const std::int64_t start = runs[i].start;
        for (std::int64_t row = start; row <= last; ++row) {
            // Up to the next row that a run branches off from, each row has its own run's next token or nothing.
            const std::int64_t plain = head == heads.end() ? last : std::min(last, head->row);
            for (; row < plain; ++row) {
                if (pair_of_position[row + 1] != kWanted) continue;
                pair_of_position[row + 1] = static_cast<std::int32_t>(counts.pairs);
                out.rows[counts.rows] = row;
                out.row_offsets[counts.rows++] = counts.pairs;
                out.pair_targets[counts.pairs++] = tokens[i][row + 1 - start];
            }
            const std::int64_t first = counts.pairs;
            const bool goes_on = row < last && pair_of_position[row + 1] == kWanted;
            if (goes_on) {
                pair_of_position[row + 1] = static_cast<std::int32_t>(counts.pairs);
                out.pair_targets[counts.pairs++] = tokens[i][row + 1 - start];
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
    return counts;
}

}  // namespace

PackedCounts fill_packed_arrays(const PackedLayout& layout, const std::int32_t* const* tokens,
                                const PackedArrays& out) {
    fill_tokens(layout, tokens, out);
    const PackedCounts counts = fill_rows(layout, tokens, out);
    std::int64_t* pair = out.pair_of_token;
    for (const LossRange& range : layout.ranges)
        pair = std::copy(out.scratch + range.start, out.scratch + range.end, pair);
    return counts;
}

}  // namespace gpo_fast
