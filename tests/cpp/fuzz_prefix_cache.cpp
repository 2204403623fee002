// libFuzzer target: bytes become calls of a PrefixCache, right and wrong ones. After each call the cache must be whole,
// and a call that threw must have changed nothing. Built with the address and undefined-behaviour sanitizers by
// `make fuzz`.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "prefix_cache.h"

namespace {

using gpo_fast::Counts;
using gpo_fast::Handles;
using gpo_fast::OutOfBlocks;
using gpo_fast::PrefixCache;

// The fuzzer's bytes as numbers; zeros when they are used up.
class Bytes {
  public:
    Bytes(const uint8_t* data, size_t size) : next_(data), end_(data + size) {}
    bool empty() const { return next_ == end_; }
    int32_t number(int32_t bound) { return next_ == end_ ? 0 : *next_++ % bound; }

  private:
    const uint8_t* next_;
    const uint8_t* end_;
};

class Caller {
  public:
    explicit Caller(Bytes bytes) : bytes_(bytes), cache_(1 + bytes_.number(24), 1 + bytes_.number(5)) {}

    void run() {
        while (!bytes_.empty()) {
            const std::string before = cache_.snapshot(false);
            try {
                call();
            } catch (const OutOfBlocks&) {
                require_unchanged(before);
            } catch (const std::invalid_argument&) {
                require_unchanged(before);
            }
            check();
        }
        cache_.release({handles_.data(), handles_.size()});
        cache_.take_copies();
        cache_.acknowledge_copies();
        if (cache_.stats().sequences + cache_.stats().marks != 0) fail("handles are left after all were released");
        check();
    }

  private:
    [[noreturn]] static void fail(const char* what) {
        std::fprintf(stderr, "failed: %s\n", what);
        std::abort();
    }

    void require_unchanged(const std::string& before) {
        if (cache_.snapshot(false) != before) fail("a call that threw has changed the tree");
    }

    void check() {
        cache_.check_integrity();  // throws: libFuzzer reports what it does not catch
        const auto s = cache_.stats();
        if (s.free + s.cached + s.live != s.num_blocks) fail("free + cached + live pages are not all pages");
    }

    // Mostly a handle that is held, sometimes one that never was or that was released.
    int64_t handle() {
        const int32_t choice = bytes_.number(64);
        if (choice == 63 || handles_.empty()) return released_;
        if (choice == 62) return static_cast<int64_t>(bytes_.number(256)) - 128;
        return handles_[choice % handles_.size()];
    }

    std::vector<int64_t> several() {
        std::vector<int64_t> chosen(1 + bytes_.number(4));
        for (int64_t& one : chosen) one = handle();
        return chosen;
    }

    // Few different tokens, so that prefixes meet.
    std::vector<int32_t> tokens(int32_t longest) {
        std::vector<int32_t> drawn(bytes_.number(longest + 1));
        for (int32_t& token : drawn) token = bytes_.number(3);
        return drawn;
    }

    int32_t position() { return bytes_.number(40) - 2; }

    void keep(const std::vector<int64_t>& made) { handles_.insert(handles_.end(), made.begin(), made.end()); }

    void call() {
        switch (bytes_.number(16)) {
            case 0:
            case 1: {
                const auto prompt = tokens(12);
                keep({cache_.open(prompt.data(), static_cast<int64_t>(prompt.size()), bytes_.number(2)).first});
                return;
            }
            case 2: {
                const auto chosen = several();
                const int32_t count = position();
                cache_.reserve({chosen.data(), chosen.size()}, {&count, 1, true});
                return;
            }
            case 3:
            case 4: {
                const auto chosen = several();
                const auto added = tokens(10);
                const auto each = static_cast<int32_t>(added.size() / chosen.size());
                const std::vector<int32_t> counts(chosen.size(), each + (bytes_.number(32) == 31));
                std::vector<int32_t> slots(added.size() + 1);
                cache_.append({chosen.data(), chosen.size()}, added.data(), each * static_cast<int64_t>(chosen.size()),
                              {counts.data(), counts.size()}, slots.data());
                return;
            }
            case 5:
            case 6: {
                const int64_t source = handle();
                const int32_t at = position(), count = bytes_.number(5) - 1;
                const Handles sources{&source, 1};
                const Counts counts{&count, 1};
                std::vector<int64_t> forks(PrefixCache::number_of_forks(sources, counts));
                cache_.fork(sources, {&at, 1}, counts, forks.data());
                keep(forks);
                return;
            }
            case 7: {
                const int64_t source = handle();
                const int32_t at = position();
                int64_t made = 0;
                cache_.mark({&source, 1}, {&at, 1}, &made);
                keep({made});
                return;
            }
            case 8: {
                const auto chosen = several();
                cache_.commit({chosen.data(), chosen.size()});
                return;
            }
            case 9:
                return cache_.truncate(handle(), position());
            case 10:
                return release();
            case 11: {
                const int64_t source = handle();
                const int32_t priority = bytes_.number(4);
                pins_.push_back(cache_.pin(source, priority, position()));
                return;
            }
            case 12:
                return cache_.unpin(pins_.empty() ? bytes_.number(8) : pins_[bytes_.number(255) % pins_.size()]);
            case 13:
                cache_.take_copies();
                if (bytes_.number(4) != 0) cache_.acknowledge_copies();
                return;
            case 14:
                cache_.evict(position(), bytes_.number(5) - 1);
                return;
            default:
                return rare();
        }
    }

    void release() {
        if (handles_.empty() || bytes_.number(16) == 15) {
            const auto chosen = several();
            std::vector<int64_t> left = handles_;
            cache_.release({chosen.data(), chosen.size()});
            // It did not throw, so all of them were held, and each once.
            for (const int64_t one : chosen) {
                for (size_t i = 0; i < left.size(); ++i) {
                    if (left[i] == one) {
                        left.erase(left.begin() + static_cast<std::ptrdiff_t>(i));
                        break;
                    }
                }
            }
            if (left.size() + chosen.size() != handles_.size()) fail("a handle was released that was not held");
            handles_ = left;
            return;
        }
        const size_t index = bytes_.number(255) % handles_.size();
        const int64_t one = handles_[index];
        cache_.release({&one, 1});
        handles_.erase(handles_.begin() + static_cast<std::ptrdiff_t>(index));
        released_ = one;
    }

    void rare() {
        switch (bytes_.number(4)) {
            case 0:
                cache_.begin_epoch(epoch_ += bytes_.number(3) - (bytes_.number(8) == 7));
                return;
            case 1: {
                const auto chosen = several();
                std::vector<int32_t> table;
                cache_.page_table({chosen.data(), chosen.size()}, table);
                return;
            }
            case 2: {
                const int64_t one = handle();
                if (static_cast<int32_t>(cache_.tokens(one).size()) != cache_.length(one)) fail("tokens and length");
                cache_.pages(one);
                return;
            }
            default: {
                const auto chosen = several();
                cache_.plan({chosen.data(), chosen.size()});
                return;
            }
        }
    }

    Bytes bytes_;
    PrefixCache cache_;
    std::vector<int64_t> handles_, pins_;
    int64_t released_ = 12345, epoch_ = 0;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Caller(Bytes(data, size)).run();
    return 0;
}
