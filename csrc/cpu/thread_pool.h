// Threads that stay: a parallel region costs a wake-up, not the making of threads.
#pragma once

#include <atomic>
#include <functional>
#include <memory>

namespace gpo_fast::cpu {

// Lets `threads` threads of a region wait for one another. They spin briefly and then yield.
class Barrier {
  public:
    explicit Barrier(int threads) : threads_(threads) {}
    void wait();

  private:
    const int threads_;
    std::atomic<int> arrived_{0};
    std::atomic<int> phase_{0};
};

// Runs work(thread) for thread = 0 .. threads - 1, thread 0 being the caller, and returns when all are done. One
// region at a time; a second caller waits for its turn. Safe after fork(): the child starts threads of its own.
void run_parallel(int threads, const std::function<void(int)>& work);

// Hands out 0, 1, ... below `count` to the threads that ask.
class Tasks {
  public:
    void reset() { next_.store(0, std::memory_order_relaxed); }
    bool take(int64_t count, int64_t& task) {
        task = next_.fetch_add(1, std::memory_order_relaxed);
        return task < count;
    }

  private:
    std::atomic<int64_t> next_{0};
};

}  // namespace gpo_fast::cpu
