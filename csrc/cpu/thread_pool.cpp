#include "cpu/thread_pool.h"

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace gpo_fast::cpu {

namespace {

constexpr int kSpins = 4000;  // some tens of microseconds: shorter than going to sleep and being woken

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

int64_t process_id() {
#if defined(__unix__) || defined(__APPLE__)
    return getpid();
#else
    return 0;
#endif
}

class Pool {
  public:
    ~Pool() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            ending_ = true;
            region_.fetch_add(1);
        }
        wake_.notify_all();
        for (auto& helper : helpers_) helper.join();
    }

    void run(int threads, const std::function<void(int)>& work) {
        const std::lock_guard<std::mutex> turn(turn_);
        while (static_cast<int>(helpers_.size()) < threads - 1) {
            const int index = static_cast<int>(helpers_.size()) + 1;
            helpers_.emplace_back([this, index, seen = region_.load()] { help(index, seen); });
        }
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            work_ = &work;
            threads_ = threads;
            left_.store(static_cast<int>(helpers_.size()), std::memory_order_relaxed);
            region_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        work(0);
        for (int spin = 0; left_.load(std::memory_order_acquire) > 0; ++spin) {
            if (spin < kSpins) {
                relax();
            } else {
                std::this_thread::yield();
            }
        }
    }

  private:
    void help(int index, int seen) {
        while (true) {
            for (int spin = 0; spin < kSpins && region_.load(std::memory_order_acquire) == seen; ++spin) relax();
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return region_.load() != seen; });
                seen = region_.load();
                if (ending_) return;
            }
            if (index < threads_) (*work_)(index);
            left_.fetch_sub(1, std::memory_order_release);
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> helpers_;
    std::atomic<int> region_{0}, left_{0};
    const std::function<void(int)>* work_ = nullptr;
    int threads_ = 0;
    bool ending_ = false;
};

}  // namespace

void Barrier::wait() {
    const int phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
        arrived_.store(0, std::memory_order_relaxed);
        phase_.store(phase + 1, std::memory_order_release);
        return;
    }
    for (int spin = 0; phase_.load(std::memory_order_acquire) == phase; ++spin) {
        if (spin < kSpins) {
            relax();
        } else {
            std::this_thread::yield();
        }
    }
}

void run_parallel(int threads, const std::function<void(int)>& work) {
    if (threads <= 1) return work(0);
    // Never destroyed: a forked child must not join threads that it does not have, nor a dying process its own.
    static Pool* pool = nullptr;
    static int64_t owner = -1;
    static std::mutex making;
    {
        const std::lock_guard<std::mutex> lock(making);
        if (owner != process_id()) {
            pool = new Pool;
            owner = process_id();
        }
    }
    pool->run(threads, work);
}

}  // namespace gpo_fast::cpu
