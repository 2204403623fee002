// Memory for operands of matrix products.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace gpo_fast::cpu {

// 64-byte aligned storage; not initialised unless `zero`.
template <typename T>
class Buffer {
  public:
    explicit Buffer(std::size_t count, bool zero = false) {
        if (count == 0) return;
        data_.reset(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)));
        if (!data_) throw std::bad_alloc();
        if (zero) std::memset(data_.get(), 0, count * sizeof(T));
    }
    T* get() const { return data_.get(); }

  private:
    struct Free {
        void operator()(T* pointer) const { std::free(pointer); }
    };
    std::unique_ptr<T, Free> data_;
};

}  // namespace gpo_fast::cpu
