#include "shared_plan.h"

#include <algorithm>
#include <tuple>

namespace gpo_fast {

bool SharedPlan::same_arrays(const SharedPlan& other) const {
    return group_starts == other.group_starts && group_lengths == other.group_lengths &&
           page_offsets == other.page_offsets && pages == other.pages && row_offsets == other.row_offsets &&
           rows == other.rows && tail_starts == other.tail_starts && tail_offsets == other.tail_offsets &&
           tail_pages == other.tail_pages;
}

SharedPlan SharedPlanner::build(RunTree& tree, const std::vector<int32_t>& holders) {
    plan_ = {};
    reserve_plan(holders.size());
    nodes_.clear();
    roots_.clear();
    group_above_.clear();
    group_rows_.clear();
    next_row_.assign(holders.size(), kNone);
    row_group_.assign(holders.size(), kNone);
    row_length_.resize(holders.size());
    plan_.tail_starts.resize(holders.size());
    plan_.page_offsets.push_back(0);
    ++stamp_;
    for (size_t row = 0; row < holders.size(); ++row) {
        add_row(tree, tree.holders[holders[row]], static_cast<int32_t>(row));
    }
    count_rows();
    for (const int32_t root : roots_) visit(tree, root, kNone);
    fill_rows();
    fill_tails(tree, holders);
    last_groups_ = plan_.group_starts.size();
    last_pages_ = plan_.pages.size();
    return std::move(plan_);
}

// The next plan is about as large as the last one.
void SharedPlanner::reserve_plan(size_t rows) {
    const size_t groups = last_groups_ + last_groups_ / 8 + 1;
    for (auto* array : {&plan_.group_starts, &plan_.group_lengths, &plan_.page_offsets, &plan_.row_offsets}) {
        array->reserve(groups + 1);
    }
    plan_.pages.reserve(last_pages_ + last_pages_ / 8);
    plan_.tail_offsets.reserve(rows + 1);
}

int32_t SharedPlanner::node_of(RunTree& tree, int32_t id) {
    Run& run = tree.runs[id];
    if (run.plan_stamp == stamp_) return run.plan_node;
    run.plan_stamp = stamp_;
    run.plan_node = static_cast<int32_t>(nodes_.size());
    nodes_.push_back({id});
    return run.plan_node;
}

// Enters a sequence at its run, and the runs above it that are not entered yet.
void SharedPlanner::add_row(RunTree& tree, const Holder& holder, int32_t row) {
    const size_t known = nodes_.size();
    row_length_[row] = holder.length;
    int32_t node = node_of(tree, holder.run);
    next_row_[row] = nodes_[node].first_row;
    nodes_[node].first_row = row;
    ++nodes_[node].rows;
    if (static_cast<size_t>(node) < known) return;
    climbs_.push_back(node);
    for (int32_t run = tree.runs[holder.run].parent; run != kNone; run = tree.runs[run].parent) {
        const int32_t parent = node_of(tree, run);
        nodes_[node].parent = parent;
        nodes_[node].sibling = nodes_[parent].first_child;
        nodes_[parent].first_child = node;
        if (static_cast<size_t>(parent) < known) return;
        node = parent;
    }
    roots_.push_back(node);
}

// Adds the rows of each node to its parent's: a node's children were entered after it or, on one climb, just before.
void SharedPlanner::count_rows() {
    int32_t end = static_cast<int32_t>(nodes_.size());
    for (; !climbs_.empty(); climbs_.pop_back()) {
        for (int32_t node = climbs_.back(); node < end; ++node) {
            if (nodes_[node].parent != kNone) nodes_[nodes_[node].parent].rows += nodes_[node].rows;
        }
        end = climbs_.back();
    }
}

// Goes down a run from one exit to the next; between two of them the same rows share its pages.
void SharedPlanner::visit(const RunTree& tree, int32_t index, int32_t group) {
    const Node node = nodes_[index];
    const Run& run = tree.runs[node.run];
    const size_t base = exits_.size();
    push_exits(tree, node);
    const size_t end = exits_.size();
    std::sort(exits_.begin() + base, exits_.end(), [](const Exit& a, const Exit& b) {
        return std::tie(a.position, a.row, a.node) < std::tie(b.position, b.row, b.node);
    });
    int32_t position = run.start;
    int32_t rows = node.rows;
    for (size_t i = base; i < end && rows > 1;) {
        const int32_t stop = exits_[i].position;
        if (stop > position) group = share(tree, run, position, stop, rows, group);
        position = stop;
        int32_t gone = 0;
        for (; i < end && exits_[i].position == stop; ++i) gone += leave(tree, exits_[i], group);
        rows -= gone;
        if (rows == 1) leave(tree, exits_[i], group);  // alone from here on
    }
    exits_.resize(base);
}

void SharedPlanner::push_exits(const RunTree& tree, const Node& node) {
    const size_t base = exits_.size();
    for (int32_t row = node.first_row; row != kNone; row = next_row_[row]) {
        exits_.push_back({tree.page_start(row_length_[row]), row, kNone});
    }
    for (int32_t child = node.first_child; child != kNone; child = nodes_[child].sibling) {
        exits_.push_back({tree.runs[nodes_[child].run].start, kNone, child});
    }
    // Both lists have the last entered first: turned round, exits at one position are in order already.
    std::reverse(exits_.begin() + base, exits_.end());
}

// The group of pages [begin, end) of a run; the group above goes on if its rows are the same.
int32_t SharedPlanner::share(const RunTree& tree, const Run& run, int32_t begin, int32_t end, int32_t rows,
                             int32_t above) {
    int32_t group = above;
    if (above == kNone || group_rows_[above] != rows) {
        group = static_cast<int32_t>(group_rows_.size());
        group_rows_.push_back(rows);
        group_above_.push_back(above);
        plan_.group_starts.push_back(begin);
        plan_.group_lengths.push_back(0);
        plan_.page_offsets.push_back(plan_.page_offsets.back());
    }
    const auto pages = run.pages.begin();
    plan_.pages.insert(plan_.pages.end(), pages + tree.page_index(begin - run.start),
                       pages + tree.page_index(end - run.start));
    plan_.group_lengths[group] += end - begin;
    plan_.page_offsets.back() = static_cast<int32_t>(plan_.pages.size());
    return group;
}

// Rows leave a run below `group`; returns how many.
int32_t SharedPlanner::leave(const RunTree& tree, const Exit exit, int32_t group) {
    if (exit.row != kNone) {
        row_group_[exit.row] = group;
        return 1;
    }
    const int32_t rows = nodes_[exit.node].rows;
    if (rows > 1) {
        visit(tree, exit.node, group);
        return rows;
    }
    const Node* node = &nodes_[exit.node];
    while (node->first_row == kNone) node = &nodes_[node->first_child];
    row_group_[node->first_row] = group;
    return 1;
}

void SharedPlanner::fill_rows() {
    plan_.row_offsets.push_back(0);
    for (const int32_t rows : group_rows_) plan_.row_offsets.push_back(plan_.row_offsets.back() + rows);
    plan_.rows.resize(plan_.row_offsets.back());
    std::vector<int32_t>& filled = group_rows_;  // from here on: the end of what is written
    std::copy(plan_.row_offsets.begin(), plan_.row_offsets.end() - 1, filled.begin());
    for (size_t row = 0; row < row_group_.size(); ++row) {
        for (int32_t group = row_group_[row]; group != kNone; group = group_above_[group]) {
            plan_.rows[filled[group]++] = static_cast<int32_t>(row);
        }
    }
}

void SharedPlanner::fill_tails(const RunTree& tree, const std::vector<int32_t>& holders) {
    plan_.tail_offsets.push_back(0);
    for (size_t row = 0; row < holders.size(); ++row) {
        const int32_t group = row_group_[row];
        const int32_t start = group == kNone ? 0 : plan_.group_starts[group] + plan_.group_lengths[group];
        plan_.tail_starts[row] = start;
        plan_.tail_offsets.push_back(plan_.tail_offsets.back() + tree.pages_for(row_length_[row] - start));
    }
    plan_.tail_pages.resize(plan_.tail_offsets.back());
    for (size_t row = 0; row < holders.size(); ++row) {
        const int32_t start = plan_.tail_starts[row];
        int32_t* tail = plan_.tail_pages.data() + plan_.tail_offsets[row];
        int32_t end = row_length_[row];
        for (int32_t id = tree.holders[holders[row]].run; end > start; id = tree.runs[id].parent) {
            const Run& run = tree.runs[id];
            const int32_t begin = std::max(run.start, start);
            const auto pages = run.pages.begin() + tree.page_index(begin - run.start);
            std::copy_n(pages, tree.pages_for(end - begin), tail + tree.page_index(begin - start));
            end = run.start;
        }
    }
}

}  // namespace gpo_fast
