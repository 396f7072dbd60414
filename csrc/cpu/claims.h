// Who works on what: units (a head of a sample) of equally many chunks, taken in order by whichever thread is
// free.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

namespace idcore {
namespace cpu {

// Chunks first .. first + count - 1 of a unit.
struct Run {
  int64_t unit, first, count;
};

// Whole units while there are many left, so that a thread packs K and V and finishes its rows alone; then
// ever smaller pieces of units, so that all threads end together.
class Claims {
 public:
  Claims(int64_t units, int64_t chunks, int threads)
      : chunks_(chunks), total_(units * chunks), threads_(threads) {}

  bool take(Run* run) {
    int64_t at = next_.load(std::memory_order_relaxed), stop = 0;
    do {
      if (at >= total_) return false;
      const int64_t size = std::max<int64_t>((total_ - at) / (2 * threads_), 1);
      stop = std::min(at + size, (at / chunks_ + 1) * chunks_);
    } while (!next_.compare_exchange_weak(at, stop, std::memory_order_relaxed));
    *run = Run{unit_at(at / chunks_), at % chunks_, stop - at};
    return true;
  }

 private:
  // Threads start far apart: rows of neighbouring heads touch, and what the hardware fetches beside the lines
  // that it was asked for would be lines that another core is writing.
  int64_t unit_at(int64_t turn) const {
    const int64_t units = total_ / chunks_, thread = turn % threads_, larger = units % threads_;
    return thread * (units / threads_) + std::min(thread, larger) + turn / threads_;
  }

  const int64_t chunks_, total_, threads_;
  alignas(128) std::atomic<int64_t> next_{0};
};

inline int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Waits for another thread of the team, which is at work or has lost its core for a while.
template <class Ready>
void wait_until(const Ready& ready) {
  for (int spins = 0; !ready(); ++spins) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
#if defined(__linux__)
    if (spins > 4096) sched_yield();
#endif
  }
}

}  // namespace cpu
}  // namespace idcore
