#include "prefix_cache.h"

#include <algorithm>

namespace gpo_fast {

namespace {

int32_t common_prefix(const std::vector<int32_t>& run, const int32_t* tokens, int32_t count) {
    const int32_t limit = std::min<int32_t>(count, static_cast<int32_t>(run.size()));
    int32_t n = 0;
    while (n < limit && run[n] == tokens[n]) ++n;
    return n;
}

}  // namespace

PrefixCache::PrefixCache(int32_t num_blocks, int32_t block_size)
    : num_blocks_(num_blocks),
      block_size_(block_size),
      holders_(std::max(num_blocks, 0)),
      in_tree_(std::max(num_blocks, 0)) {
    if (num_blocks < 1) throw std::invalid_argument("num_blocks must be at least 1, got " + std::to_string(num_blocks));
    if (block_size < 1) throw std::invalid_argument("block_size must be at least 1, got " + std::to_string(block_size));
    free_.reserve(num_blocks);
    for (int32_t page = num_blocks; page-- > 0;) free_.push_back(page);
}

void PrefixCache::begin_epoch(int64_t version) {
    if (version <= epoch_) {
        throw std::invalid_argument("an epoch's version must be above the last one, " + std::to_string(epoch_) +
                                    ", got " + std::to_string(version));
    }
    epoch_ = version;
    for (auto& child : root_.children) drop_tree(child.get());
    root_.children.clear();
    recency_.clear();
}

void PrefixCache::drop_tree(Node* node) {
    for (auto& child : node->children) drop_tree(child.get());
    in_tree_[node->page] = 0;
    if (holders_[node->page] == 1) --cached_;
    let_go(node->page);
}

std::pair<int64_t, int32_t> PrefixCache::open(const int32_t* tokens, int32_t count) {
    if (count < 1) throw std::invalid_argument("open needs at least one token");
    const int64_t handle = new_sequence();
    Sequence& sequence = find(handle);
    const int32_t limit = count - 1;  // the last token's logits must be computed
    int32_t hit = 0;
    std::vector<Node*> path;
    for (Node* node = &root_; hit < limit;) {
        Node* best = nullptr;
        int32_t best_match = 0;
        for (auto& child : node->children) {
            const int32_t match = common_prefix(child->tokens, tokens + hit, limit - hit);
            if (match > best_match) best = child.get(), best_match = match;
        }
        if (!best) break;
        sequence.pages.push_back(best->page);
        hold(best->page);
        path.push_back(best);
        hit += best_match;
        if (best_match < block_size_) break;
        node = best;
    }
    for (auto it = path.rbegin(); it != path.rend(); ++it) touch(*it);
    sequence.tokens.assign(tokens, tokens + hit);
    hit_tokens_ += hit;
    opened_tokens_ += count;
    return {handle, hit};
}

bool PrefixCache::tail_is_shared(const Sequence& sequence) const {
    return sequence.tokens.size() % block_size_ != 0 && holders_[sequence.pages.back()] > 1;
}

int32_t PrefixCache::pages_needed(const Sequence& sequence, int32_t count) const {
    if (count == 0) return 0;
    const int32_t length = static_cast<int32_t>(sequence.tokens.size());
    const int32_t pages =
        (length + count + block_size_ - 1) / block_size_ - static_cast<int32_t>(sequence.pages.size());
    return pages + (tail_is_shared(sequence) ? 1 : 0);
}

bool PrefixCache::reserve(const std::vector<int64_t>& sequences, const std::vector<int32_t>& lengths) {
    if (sequences.size() != lengths.size()) throw std::invalid_argument("reserve needs one length for each sequence");
    int64_t needed = 0;
    for (size_t i = 0; i < sequences.size(); ++i) {
        const Sequence& sequence = find(sequences[i]);
        if (lengths[i] < 0)
            throw std::invalid_argument("a length must not be negative, got " + std::to_string(lengths[i]));
        needed +=
            std::max<int64_t>(0, pages_needed(sequence, lengths[i]) - static_cast<int64_t>(sequence.reserved.size()));
    }
    const int64_t available = static_cast<int64_t>(free_.size()) + cached_;
    if (needed > available) return false;
    // Pages above the source of a copy that is not yet acknowledged stay, though only the tree holds them.
    const int64_t missing = needed - static_cast<int64_t>(free_.size());
    if (missing > 0 && evict(static_cast<int32_t>(missing)) < missing) return false;
    for (size_t i = 0; i < sequences.size(); ++i) {
        Sequence& sequence = find(sequences[i]);
        while (static_cast<int32_t>(sequence.reserved.size()) < pages_needed(sequence, lengths[i])) {
            sequence.reserved.push_back(take_free_page());
        }
    }
    return true;
}

std::vector<int32_t> PrefixCache::append(const std::vector<int64_t>& sequences, const int32_t* tokens,
                                         const std::vector<int32_t>& lengths) {
    if (!reserve(sequences, lengths)) throw OutOfBlocks("no free KV block is left: reserve() says so without an error");
    std::vector<int32_t> slots;
    for (size_t i = 0; i < sequences.size(); ++i) {
        Sequence& sequence = find(sequences[i]);
        if (lengths[i] > 0 && tail_is_shared(sequence)) {
            const int32_t source = sequence.pages.back();
            const int32_t target = sequence.reserved.back();
            sequence.reserved.pop_back();
            const int32_t used = static_cast<int32_t>(sequence.tokens.size()) % block_size_;
            copies_.push_back({source * block_size_, target * block_size_, used});
            copy_sources_.push_back(source);  // the sequence's hold on the source passes to the copy
            sequence.pages.back() = target;
            ++num_copies_;
        }
        for (int32_t k = 0; k < lengths[i]; ++k) {
            const int32_t offset = static_cast<int32_t>(sequence.tokens.size()) % block_size_;
            if (offset == 0) {
                sequence.pages.push_back(sequence.reserved.back());
                sequence.reserved.pop_back();
            }
            slots.push_back(sequence.pages.back() * block_size_ + offset);
            sequence.tokens.push_back(*tokens++);
        }
    }
    return slots;
}

std::vector<int64_t> PrefixCache::fork(int64_t source, int32_t position, int32_t count) {
    const int32_t length = this->length(source);
    if (position < 0 || position > length) {
        throw std::invalid_argument("cannot fork at " + std::to_string(position) + " a sequence of " +
                                    std::to_string(length) + " tokens");
    }
    if (count < 0) throw std::invalid_argument("cannot make " + std::to_string(count) + " forks");
    std::vector<int64_t> handles;
    for (int32_t i = 0; i < count; ++i) {
        const int64_t handle = new_sequence();
        Sequence& fork = find(handle);  // new_sequence may move the sequences: look both up after it
        const Sequence& parent = find(source);
        fork.epoch = parent.epoch;
        fork.tokens.assign(parent.tokens.begin(), parent.tokens.begin() + position);
        fork.pages.assign(parent.pages.begin(), parent.pages.begin() + (position + block_size_ - 1) / block_size_);
        for (int32_t page : fork.pages) hold(page);
        handles.push_back(handle);
    }
    return handles;
}

void PrefixCache::commit(int64_t handle) {
    Sequence& sequence = find(handle);
    if (sequence.epoch != epoch_) return;
    const int32_t length = static_cast<int32_t>(sequence.tokens.size());
    std::vector<Node*> path;
    Node* node = &root_;
    for (int32_t start = 0, index = 0; start < length; start += block_size_, ++index) {
        const int32_t count = std::min(block_size_, length - start);
        const int32_t* run = sequence.tokens.data() + start;
        const int32_t page = sequence.pages[index];
        Node* next = nullptr;
        for (auto& child : node->children) {
            if (common_prefix(child->tokens, run, count) == count) next = child.get();  // all of it is there already
        }
        if (!next) {
            auto child = std::make_unique<Node>();
            child->parent = node;
            child->page = page;
            child->tokens.assign(run, run + count);
            next = child.get();
            next->recency = recency_.insert(recency_.end(), next);
            node->children.push_back(std::move(child));
            hold(page);
            in_tree_[page] = 1;
        }
        if (count == block_size_ && next->page != page) {
            // De-duplication. A sequence holds the page of every full node above its own, so that a node that only
            // the tree holds never has a held one below it and can always be evicted.
            hold(next->page);
            sequence.pages[index] = next->page;
            let_go(page);
        }
        path.push_back(next);
        node = next;
    }
    for (auto it = path.rbegin(); it != path.rend(); ++it) touch(*it);
}

void PrefixCache::truncate(int64_t handle, int32_t length) {
    Sequence& sequence = find(handle);
    if (length < 0 || length > static_cast<int32_t>(sequence.tokens.size())) {
        throw std::invalid_argument("cannot truncate to " + std::to_string(length) + " a sequence of " +
                                    std::to_string(sequence.tokens.size()) + " tokens");
    }
    const size_t keep = (length + block_size_ - 1) / block_size_;
    while (sequence.pages.size() > keep) {
        let_go(sequence.pages.back());
        sequence.pages.pop_back();
    }
    sequence.tokens.resize(length);
}

void PrefixCache::release(const std::vector<int64_t>& sequences) {
    for (size_t i = 0; i < sequences.size(); ++i) {
        find(sequences[i]);
        for (size_t k = 0; k < i; ++k) {
            if (sequences[k] == sequences[i]) throw std::invalid_argument("a sequence is named twice in one release");
        }
    }
    for (int64_t handle : sequences) {
        Sequence& sequence = find(handle);
        for (int32_t page : sequence.pages) let_go(page);
        for (int32_t page : sequence.reserved) let_go(page);
        sequence.tokens.clear();
        sequence.pages.clear();
        sequence.reserved.clear();
        sequence.live = false;
        ++sequence.generation;
        free_sequences_.push_back(static_cast<int32_t>(handle & 0xffffffff));
    }
}

std::vector<CopyJob> PrefixCache::take_copies() {
    std::vector<CopyJob> jobs;
    jobs.swap(copies_);
    return jobs;
}

void PrefixCache::acknowledge_copies() {
    if (!copies_.empty()) throw std::invalid_argument("copies are acknowledged before they were taken");
    for (int32_t page : copy_sources_) let_go(page);
    copy_sources_.clear();
}

int32_t PrefixCache::evict(int32_t count) {
    int32_t done = 0;
    // A node is touched after its children, so the oldest nodes are leaves or held; one that has become a leaf
    // since is found by starting again at the oldest.
    for (auto it = recency_.begin(); it != recency_.end() && done < count && cached_ > 0;) {
        Node* node = *it;
        if (!node->children.empty() || holders_[node->page] > 1) {
            ++it;
            continue;
        }
        remove_leaf(node);
        ++done;
        it = recency_.begin();
    }
    evicted_ += done;
    return done;
}

void PrefixCache::remove_leaf(Node* node) {
    recency_.erase(node->recency);
    in_tree_[node->page] = 0;
    --cached_;
    let_go(node->page);
    auto& siblings = node->parent->children;
    siblings.erase(std::find_if(siblings.begin(), siblings.end(), [node](auto& child) { return child.get() == node; }));
}

int32_t PrefixCache::length(int64_t handle) const { return static_cast<int32_t>(find(handle).tokens.size()); }
const std::vector<int32_t>& PrefixCache::pages(int64_t handle) const { return find(handle).pages; }
const std::vector<int32_t>& PrefixCache::tokens(int64_t handle) const { return find(handle).tokens; }

CacheStats PrefixCache::stats() const {
    const int64_t free = static_cast<int64_t>(free_.size());
    const int64_t sequences = static_cast<int64_t>(sequences_.size() - free_sequences_.size());
    return {num_blocks_,    free,     cached_,    num_blocks_ - free - cached_, sequences, hit_tokens_,
            opened_tokens_, evicted_, num_copies_};
}

void PrefixCache::check_integrity() const {
    const auto require = [](bool condition, const char* invariant) {
        if (!condition) throw std::logic_error(std::string("broken invariant: ") + invariant);
    };
    std::vector<int32_t> counted(num_blocks_);
    for (const Sequence& sequence : sequences_) {
        require(sequence.live || sequence.pages.empty(), "a released sequence holds nothing");
        require(sequence.pages.size() == (sequence.tokens.size() + block_size_ - 1) / block_size_,
                "a sequence has just the pages that its tokens fill");
        for (int32_t page : sequence.pages) ++counted[page];
        for (int32_t page : sequence.reserved) ++counted[page];
    }
    for (int32_t page : copy_sources_) ++counted[page];
    size_t nodes = 0;
    int32_t cached = 0;
    std::vector<const Node*> stack{&root_};
    while (!stack.empty()) {
        const Node* node = stack.back();
        stack.pop_back();
        for (const auto& child : node->children) {
            require(node == &root_ || static_cast<int32_t>(node->tokens.size()) == block_size_,
                    "a partial page is a leaf");
            require(in_tree_[child->page], "a node's page is marked as the tree's");
            if (++counted[child->page] == 1) ++cached;
            ++nodes;
            stack.push_back(child.get());
        }
    }
    require(nodes == recency_.size(), "every node is in the recency list");
    require(cached == cached_, "cached pages are those that only the tree holds");
    for (int32_t page : free_) require(counted[page] == 0, "a free page has no holder");
    int32_t unheld = 0;
    for (int32_t page = 0; page < num_blocks_; ++page) {
        require(counted[page] == holders_[page], "a page's count equals its holders");
        unheld += counted[page] == 0;
    }
    require(unheld == static_cast<int32_t>(free_.size()), "free + cached + live = total");
}

PrefixCache::Sequence& PrefixCache::find(int64_t handle) {
    return const_cast<Sequence&>(static_cast<const PrefixCache*>(this)->find(handle));
}

const PrefixCache::Sequence& PrefixCache::find(int64_t handle) const {
    const int64_t index = handle & 0xffffffff;
    const uint32_t generation = static_cast<uint32_t>(handle >> 32);
    if (handle < 0 || index >= static_cast<int64_t>(sequences_.size()) || !sequences_[index].live ||
        sequences_[index].generation != generation) {
        throw std::invalid_argument("no live sequence has the handle " + std::to_string(handle) +
                                    ": it was released or never opened");
    }
    return sequences_[index];
}

int64_t PrefixCache::new_sequence() {
    int32_t index;
    if (free_sequences_.empty()) {
        index = static_cast<int32_t>(sequences_.size());
        sequences_.emplace_back();
    } else {
        index = free_sequences_.back();
        free_sequences_.pop_back();
    }
    Sequence& sequence = sequences_[index];
    sequence.live = true;
    sequence.epoch = epoch_;
    return (static_cast<int64_t>(sequence.generation & 0x7fffffff) << 32) | index;
}

int32_t PrefixCache::take_free_page() {
    const int32_t page = free_.back();
    free_.pop_back();
    holders_[page] = 1;
    return page;
}

void PrefixCache::hold(int32_t page) {
    if (in_tree_[page] && holders_[page] == 1) --cached_;
    ++holders_[page];
}

void PrefixCache::let_go(int32_t page) {
    if (--holders_[page] == 0) {
        free_.push_back(page);
    } else if (holders_[page] == 1 && in_tree_[page]) {
        ++cached_;
    }
}

void PrefixCache::touch(Node* node) { recency_.splice(recency_.end(), recency_, node->recency); }

}  // namespace gpo_fast
