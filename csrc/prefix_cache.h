// PrefixCache: which KV pages hold which tokens, for sequences that branch anywhere.
//
// The pool has `num_blocks` pages of `block_size` tokens. A page is held by any number of sequences and by at most
// one node of the tree of committed (matchable) pages:
//
//   tree:   root -> [page 3: t0..t15] -> [page 7: t16..t31] -> [page 9: t32..t36]   (a partial page is a leaf)
//                                     -> [page 4: t16..t20, u21..u31]
//   sequence: pages 3, 7, 9 and a length; a fork copies the page list and counts one more holder for each page.
//
// A page is written in place only by its sole holder; any other writer copies the used part first (copy-on-write).
// The caller performs the copies that `take_copies` lists before it writes the slots that `append` gave, and
// commits a sequence only after the keys and values of its tokens have been computed.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

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
    int64_t num_blocks, free, cached, live, sequences, hit_tokens, opened_tokens, evicted, copies;
};

class PrefixCache {
  public:
    PrefixCache(int32_t num_blocks, int32_t block_size);

    // Nothing committed before can match from now on; its pages are freed when their last holder lets go.
    void begin_epoch(int64_t version);

    // A sequence that holds the longest committed prefix of `tokens`, at most all but the last token.
    std::pair<int64_t, int32_t> open(const int32_t* tokens, int32_t count);

    // Makes sure that sequence i can take lengths[i] more tokens, evicting committed pages. All or nothing.
    bool reserve(const std::vector<int64_t>& sequences, const std::vector<int32_t>& lengths);

    // Slots (page * block_size + offset) of the new tokens. Throws OutOfBlocks, changing nothing, without room.
    std::vector<int32_t> append(const std::vector<int64_t>& sequences, const int32_t* tokens,
                                const std::vector<int32_t>& lengths);

    // `count` new sequences that share the first `position` tokens of a sequence or mark.
    std::vector<int64_t> fork(int64_t source, int32_t position, int32_t count);

    // Makes a sequence's tokens matchable. A sequence of an older epoch stays private.
    void commit(int64_t sequence);
    void truncate(int64_t sequence, int32_t length);
    void release(const std::vector<int64_t>& sequences);

    // Copy-on-write jobs since the last call; their sources live until the copies are acknowledged.
    std::vector<CopyJob> take_copies();
    void acknowledge_copies();

    // Frees up to `count` committed pages that no sequence holds, least recently used leaves first.
    int32_t evict(int32_t count);

    int32_t length(int64_t sequence) const;
    const std::vector<int32_t>& pages(int64_t sequence) const;
    const std::vector<int32_t>& tokens(int64_t sequence) const;
    int32_t block_size() const { return block_size_; }
    CacheStats stats() const;

    // Throws std::logic_error naming the invariant that does not hold.
    void check_integrity() const;

  private:
    struct Node {
        Node* parent = nullptr;
        int32_t page = -1;
        std::vector<int32_t> tokens;
        std::vector<std::unique_ptr<Node>> children;
        std::list<Node*>::iterator recency;
    };
    struct Sequence {
        bool live = false;
        uint32_t generation = 0;
        int64_t epoch = 0;
        std::vector<int32_t> tokens;
        std::vector<int32_t> pages;
        std::vector<int32_t> reserved;  // pages held for tokens to come
    };

    Sequence& find(int64_t handle);
    const Sequence& find(int64_t handle) const;
    int64_t new_sequence();
    int32_t pages_needed(const Sequence& sequence, int32_t count) const;
    bool tail_is_shared(const Sequence& sequence) const;
    int32_t take_free_page();
    void hold(int32_t page);
    void let_go(int32_t page);
    void touch(Node* node);
    void remove_leaf(Node* node);
    void drop_tree(Node* node);

    int32_t num_blocks_, block_size_;
    int64_t epoch_ = 0;
    Node root_;
    std::list<Node*> recency_;         // nodes, least recently used first
    std::vector<int32_t> holders_;     // per page: sequences, reservations, pending copies and the tree
    std::vector<uint8_t> in_tree_;     // per page
    std::vector<int32_t> free_;        // stack of free pages
    int32_t cached_ = 0;               // pages that only the tree holds: all of them can be evicted
    std::vector<Sequence> sequences_;  // slots, reused with a new generation
    std::vector<int32_t> free_sequences_;
    std::vector<CopyJob> copies_;
    std::vector<int32_t> copy_sources_;  // pages held for copies that are not acknowledged
    int64_t hit_tokens_ = 0, opened_tokens_ = 0, evicted_ = 0, num_copies_ = 0;
};

}  // namespace gpo_fast
