// Several threads make random calls on one PrefixCache, each with handles of its own. Built with a sanitizer by
// `make sanitize`: ThreadSanitizer sees unguarded accesses, AddressSanitizer sees stale ones.
//
//   two_threads [operations per thread] [threads]
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "prefix_cache.h"

namespace {

using gpo_fast::Counts;
using gpo_fast::Handles;
using gpo_fast::PrefixCache;

struct Owned {
    int64_t handle;
    std::vector<int32_t> tokens;
    bool is_sequence;
};

void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "failed: %s\n", what);
    std::abort();
}

Handles one(const int64_t& handle) { return {&handle, 1}; }
Counts one(const int32_t& count) { return {&count, 1, true}; }

class Worker {
  public:
    Worker(PrefixCache& cache, uint32_t seed) : cache_(cache), random_(seed) {}

    void run(int operations) {
        for (int i = 0; i < operations; ++i) {
            step(draw(12));
            if (owned_.size() > 12) release(draw(owned_.size()));
            if (!owned_.empty()) check(owned_[draw(owned_.size())]);
        }
        while (!owned_.empty()) release(0);
    }

  private:
    size_t draw(size_t bound) { return random_() % bound; }

    void step(size_t operation) {
        if (operation < 3 || owned_.empty()) return open();
        const size_t index = draw(owned_.size());
        Owned& owned = owned_[index];
        const auto position = static_cast<int32_t>(draw(owned.tokens.size() + 1));
        switch (operation) {
            case 3:
            case 4:
            case 5:
                if (owned.is_sequence) append(owned, draw(6));
                return;
            case 6:
            case 7:
                return hold(owned, position, operation == 6);
            case 8:
                return commit(owned);
            case 9:
                if (!owned.is_sequence) return;
                cache_.truncate(owned.handle, position);
                owned.tokens.resize(position);
                return;
            case 10:
                cache_.evict(static_cast<int32_t>(draw(4)), 0);
                return plan();
            default:
                return release(index);
        }
    }

    void open() {
        std::vector<int32_t> tokens(1 + draw(12));
        for (int32_t& token : tokens) token = static_cast<int32_t>(draw(2));
        const auto [handle, hit] = cache_.open(tokens.data(), static_cast<int64_t>(tokens.size()), 0);
        owned_.push_back({handle, {tokens.begin(), tokens.begin() + hit}, true});
    }

    void append(Owned& owned, size_t count) {
        std::vector<int32_t> tokens(count), slots(count);
        for (int32_t& token : tokens) token = static_cast<int32_t>(draw(2));
        const auto length = static_cast<int32_t>(count);
        if (draw(2) && !cache_.reserve(one(owned.handle), one(length))) return;
        try {
            cache_.append(one(owned.handle), tokens.data(), length, one(length), slots.data());
        } catch (const gpo_fast::OutOfBlocks&) {
            return;
        }
        owned.tokens.insert(owned.tokens.end(), tokens.begin(), tokens.end());
        acknowledge();
    }

    // Another thread may have added copies since they were taken: then it acknowledges them all.
    void acknowledge() {
        cache_.take_copies();
        try {
            cache_.acknowledge_copies();
        } catch (const std::invalid_argument&) {
        }
    }

    void hold(const Owned& owned, int32_t position, bool is_sequence) {
        int64_t handle;
        if (is_sequence) {
            const int32_t count = 1;
            cache_.fork(one(owned.handle), one(position), one(count), &handle);
        } else {
            cache_.mark(one(owned.handle), one(position), &handle);
        }
        owned_.push_back({handle, {owned.tokens.begin(), owned.tokens.begin() + position}, is_sequence});
    }

    void commit(const Owned& owned) {
        if (!owned.is_sequence) return;
        try {
            cache_.commit(one(owned.handle));
        } catch (const std::invalid_argument&) {  // waits for a copy that another thread is to acknowledge
        }
    }

    void plan() {
        std::vector<int64_t> handles;
        for (const Owned& owned : owned_) handles.push_back(owned.handle);
        const auto plan = cache_.plan({handles.data(), handles.size()});
        require(plan->tail_starts.size() == handles.size(), "a plan has a tail for each sequence");
    }

    void release(size_t index) {
        cache_.release(one(owned_[index].handle));
        owned_.erase(owned_.begin() + static_cast<std::ptrdiff_t>(index));
    }

    void check(const Owned& owned) {
        require(cache_.tokens(owned.handle) == owned.tokens, "a handle has the tokens that its thread gave it");
        const size_t pages = (owned.tokens.size() + cache_.block_size() - 1) / cache_.block_size();
        require(cache_.pages(owned.handle).size() == pages, "a handle has the pages of its tokens");
        if (draw(16) == 0) cache_.check_integrity();
    }

    PrefixCache& cache_;
    std::mt19937 random_;
    std::vector<Owned> owned_;
};

}  // namespace

int main(int argc, char** argv) {
    const int operations = argc > 1 ? std::atoi(argv[1]) : 20000;
    const int threads = argc > 2 ? std::atoi(argv[2]) : 2;
    for (const int32_t block_size : {1, 3, 4}) {
        PrefixCache cache(60, block_size);
        std::vector<std::thread> running;
        for (int i = 0; i < threads; ++i) {
            running.emplace_back([&cache, operations, i] { Worker(cache, 7 + i).run(operations); });
        }
        for (std::thread& thread : running) thread.join();
        cache.take_copies();
        cache.acknowledge_copies();
        cache.check_integrity();
        const gpo_fast::CacheStats stats = cache.stats();
        require(stats.live == 0 && stats.sequences == 0 && stats.marks == 0, "all that was held has been let go");
        std::printf("block size %d: %d x %d operations, %lld pages evicted, %lld copies, %lld deduplicated\n",
                    block_size, threads, operations, static_cast<long long>(stats.evicted),
                    static_cast<long long>(stats.copies), static_cast<long long>(stats.deduplicated));
    }
}
