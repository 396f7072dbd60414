// Who works on what. Units (a head of a sample) have equally many chunks; all chunks stand in a row, unit by
// unit.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>

#if defined(__linux__)
#include <sched.h>
#endif

namespace idcore {
namespace cpu {

// Chunks first .. first + count - 1 of a unit. `slot`: for who keeps them in a ring, the first one's place,
// or -1.
struct Run {
  int64_t unit, first, count, slot;
};

// Each thread has a region of the row and takes it from the front: whole units while many are left, so that
// it packs K and V and finishes its rows alone, then ever smaller pieces. Who is done takes from the others,
// so that all end together. Regions also keep threads apart and make them meet the same memory in every call:
// rows of neighbouring heads touch, and the hardware fetches more than it was asked for, so that two cores
// would take lines from each other.
class Claims {
 public:
  struct alignas(128) Region {
    std::atomic<int64_t> next;
    int64_t end;
  };

  // `regions`: memory for as many as there are threads.
  Claims(Region* regions, int threads, int64_t units, int64_t chunks)
      : regions_(regions), threads_(threads), chunks_(chunks) {
    const int64_t total = units * chunks;
    for (int t = 0; t < threads; ++t) {
      new (&regions_[t].next) std::atomic<int64_t>(t * total / threads);
      regions_[t].end = (t + 1) * total / threads;
    }
  }

  // The next piece of work; false: there is none. Until then no thread may wait for another.
  bool take(int thread, Run* run) {
    Region* from = &regions_[thread];
    while (from != nullptr) {
      if (take_from(*from, run)) return true;
      from = fullest();
    }
    return false;
  }

 private:
  bool take_from(Region& region, Run* run) const {
    int64_t at = region.next.load(std::memory_order_relaxed), stop = 0;
    do {
      if (at >= region.end) return false;
      const int64_t size = std::max<int64_t>((region.end - at) / 2, 1);
      stop = std::min(at + size, (at / chunks_ + 1) * chunks_);
    } while (!region.next.compare_exchange_weak(at, stop, std::memory_order_relaxed));
    *run = Run{at / chunks_, at % chunks_, stop - at, -1};
    return true;
  }

  Region* fullest() const {
    Region* best = nullptr;
    int64_t most = 0;
    for (int t = 0; t < threads_; ++t) {
      const int64_t left = regions_[t].end - regions_[t].next.load(std::memory_order_relaxed);
      if (left > most) best = &regions_[t], most = left;
    }
    return best;
  }

  Region* const regions_;
  const int threads_;
  const int64_t chunks_;
};

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
