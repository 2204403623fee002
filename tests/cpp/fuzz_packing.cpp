// libFuzzer target: bytes become a forest, which is laid out and packed; what comes out is compared with its
// definition (packing.h). Built with the address and undefined-behaviour sanitizers by `make fuzz`.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "packing.h"

namespace {

using namespace gpo_fast;

struct Node {
    int64_t parent, depth;  // -1: a prompt; depth of its first token
    std::vector<int32_t> tokens;
    std::vector<size_t> children;
    int64_t start = 0, before = -1;  // in the packed row
};

struct Forest {
    std::vector<Node> nodes;
    int64_t size = 0;

    // A run, then its children from the deepest branch point on, each with its subtree.
    void place(size_t index, int64_t before) {
        Node& node = nodes[index];
        node.start = size;
        node.before = before;
        size += static_cast<int64_t>(node.tokens.size());
        std::stable_sort(node.children.begin(), node.children.end(),
                         [this](size_t a, size_t b) { return nodes[a].depth > nodes[b].depth; });
        for (const size_t child : node.children) place(child, node.start + nodes[child].depth - node.depth - 1);
    }
};

Forest forest_of(const uint8_t* data, size_t size) {
    Forest forest;
    auto next = [&, at = size_t{0}](int64_t bound) mutable {
        return at < size ? static_cast<int64_t>(data[at++]) % bound : 0;
    };
    const int64_t count = 1 + std::min<int64_t>(static_cast<int64_t>(size) / 3, 40);
    for (int64_t i = 0; i < count; ++i) {
        Node node{-1, 0, {}, {}};
        if (i > 0 && next(5) != 0) {
            node.parent = next(i);
            Node& parent = forest.nodes[node.parent];
            node.depth = parent.depth + 1 + next(static_cast<int64_t>(parent.tokens.size()));
            parent.children.push_back(static_cast<size_t>(i));
        }
        node.tokens.resize(1 + next(6));
        for (int32_t& token : node.tokens) token = static_cast<int32_t>(next(3));
        forest.nodes.push_back(node);
    }
    for (size_t i = 0; i < forest.nodes.size(); ++i) {
        if (forest.nodes[i].parent == -1) forest.place(i, -1);
    }
    return forest;
}

void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "failed: %s\n", what);
    std::abort();
}

// Each branch trains its own tokens; every third one also what it has of its parent's.
std::vector<LossRange> ranges_of(const Forest& forest, const std::vector<int64_t>& branches,
                                 const std::vector<int64_t>& loss_starts) {
    std::vector<LossRange> ranges;
    for (size_t i = 0; i < branches.size(); ++i) {
        const Node& node = forest.nodes[branches[i]];
        const auto sequence = static_cast<int64_t>(i);
        if (loss_starts[i] < node.depth) {
            const Node& parent = forest.nodes[node.parent];
            ranges.push_back({parent.start, parent.start + node.depth - parent.depth, sequence});
        }
        ranges.push_back({node.start, node.start + static_cast<int64_t>(node.tokens.size()), sequence});
    }
    return ranges;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    const Forest forest = forest_of(data, size);
    std::vector<ForestNode> nodes;
    std::vector<int64_t> every_node, starts;  // all are on a branch's path; a prompt's loss starts behind its end
    std::vector<int64_t> branches, loss_starts;
    std::vector<const int32_t*> tokens;
    std::vector<int64_t> predecessor(forest.size), expected(forest.size), depth(forest.size);
    std::vector<int32_t> ends(forest.size), expected_ends(forest.size), scratch(forest.size + 1);
    for (size_t i = 0; i < forest.nodes.size(); ++i) {
        const Node& node = forest.nodes[i];
        const auto length = static_cast<int64_t>(node.tokens.size());
        nodes.push_back({node.parent, node.depth, node.depth + length});
        every_node.push_back(static_cast<int64_t>(i));
        starts.push_back(node.depth + length);
        if (node.parent != -1) {
            const Node& parent = forest.nodes[node.parent];
            branches.push_back(static_cast<int64_t>(i));
            loss_starts.push_back(i % 3 == 0 && parent.parent != -1 ? parent.depth : node.depth);
            starts.back() = loss_starts.back();
        }
        tokens.push_back(node.tokens.data());
        for (int64_t t = 0; t < length; ++t) {
            predecessor[node.start + t] = t > 0 ? node.start + t - 1 : node.before;
            expected[node.start + t] = node.tokens[t];
            depth[node.start + t] = node.depth + t;
        }
    }
    for (int64_t position = forest.size - 1; position >= 0; --position) {
        expected_ends[position] = std::max(expected_ends[position], static_cast<int32_t>(position + 1));
        int32_t* before = predecessor[position] < 0 ? nullptr : &expected_ends[predecessor[position]];
        if (before) *before = std::max(*before, expected_ends[position]);
    }
    const std::vector<LossRange> ranges = ranges_of(forest, branches, loss_starts);
    const PackedLayout layout = lay_out(nodes, every_node, starts);
    require(layout.tokens == forest.size && layout.kept == branches, "the size, or which branches have a loss");
    int64_t losses = 0;
    for (const LossRange& range : ranges) losses += range.end - range.start;

    // As many places as the contract says, so that the sanitizer sees a write beyond them.
    std::vector<int64_t> input_ids(forest.size), position_ids(forest.size), rows(losses), row_offsets(losses + 1),
        pair_targets(losses), pair_of_token(losses), targets(losses), sequence_ids(losses);
    const PackedCounts counts = fill_packed_arrays(
        layout, tokens.data(),
        {input_ids.data(), position_ids.data(), ends.data(), rows.data(), row_offsets.data(), pair_targets.data(),
         pair_of_token.data(), targets.data(), sequence_ids.data(), scratch.data()});

    require(input_ids == expected && position_ids == depth, "tokens or positions");
    require(ends == expected_ends, "subtree ends");
    // Each query sees its span up to itself and, once, its blocks: in all its depth + 1 keys.
    std::vector<int64_t> seen(forest.size);
    for (const Span& span : layout.spans)
        for (int64_t i = span.start; i < span.end; ++i) seen[i] += i - span.start + 1;
    for (const Block& block : layout.blocks)
        for (int64_t i = block.query_start; i < block.query_end; ++i) seen[i] += block.key_end - block.key_start;
    for (int64_t i = 0; i < forest.size; ++i) require(seen[i] == depth[i] + 1, "spans and blocks");
    std::vector<int64_t> row_of_pair(counts.pairs);
    for (int64_t r = 0; r < counts.rows; ++r) {
        require(row_offsets[r] < row_offsets[r + 1] && (r == 0 || rows[r - 1] < rows[r]), "rows without order");
        for (int64_t k = row_offsets[r]; k < row_offsets[r + 1]; ++k) {
            row_of_pair[k] = rows[r];
            for (int64_t other = row_offsets[r]; other < k; ++other)
                require(pair_targets[other] != pair_targets[k], "a pair that is there twice");
        }
    }
    require(counts.rows == 0 || row_offsets[counts.rows] == counts.pairs, "the last offset");
    int64_t t = 0;
    for (const LossRange& range : ranges) {
        for (int64_t position = range.start; position < range.end; ++position, ++t) {
            require(targets[t] == expected[position] && sequence_ids[t] == range.sequence, "a loss token");
            require(pair_targets[pair_of_token[t]] == targets[t], "a pair's target");
            require(row_of_pair[pair_of_token[t]] == predecessor[position], "a pair's row");
        }
    }
    return 0;
}
