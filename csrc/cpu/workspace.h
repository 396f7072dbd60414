// What the drivers of the CPU kernels share: memory that stays from call to call, and the rounding mode.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace idcore {
namespace cpu {

// Probabilities far below 1 and their powers are subnormal; on many CPUs each one costs a hundred cycles.
class FlushSubnormals {
 public:
#if defined(__SSE__)
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

// Memory that a thread keeps from call to call: fresh pages would cost a fault each, as much as the
// arithmetic.
class Workspace {
 public:
  ~Workspace() { release(); }
  char* at_least(size_t bytes) {
    if (bytes > size_) {
      release();
      constexpr size_t kHuge = size_t{2} << 20;
      const size_t unit = bytes >= kHuge ? kHuge : 4096;
      const size_t rounded = (bytes + unit - 1) / unit * unit;
      data_ = static_cast<char*>(std::aligned_alloc(unit, rounded));
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = rounded;
#if defined(__linux__)
      if (unit == kHuge) madvise(data_, rounded, MADV_HUGEPAGE);
#endif
    }
    return data_;
  }
  int64_t release() {
    const int64_t bytes = static_cast<int64_t>(size_);
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
    return bytes;
  }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

// Hands out pieces of the workspace; without a base it only counts.
class Pieces {
 public:
  explicit Pieces(char* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// The calling thread's.
Workspace& thread_workspace();
// Frees it; it comes back with the next call. Returns the bytes freed.
int64_t release_workspace();

}  // namespace cpu
}  // namespace idcore
