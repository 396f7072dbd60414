// The names of warp.cuh on the host, so that the kernels' index arithmetic can be tested without a GPU.
//
// Every CUDA thread is a fiber. A fiber runs until it must wait for its warp or its block; which one goes on
// next is drawn from a seeded generator, so a missing barrier shows as a result that depends on the seed.
// Background copies are made only when they are waited for, shared memory starts as NaN, and addresses in it
// are checked. Fragment layouts follow the PTX manual (mma.m16n8k16, ldmatrix). For tests only.
#pragma once

#include <immintrin.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

namespace idcore {
namespace cuda {
namespace emulated {

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Block;

struct Thread {
  Block* block = nullptr;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  int index = 0;
  bool done = false;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

// A meeting point: `size` threads arrive, then all go on.
struct Meeting {
  int size = 0, arrived = 0;
  long round = 0;
};

struct Warp {
  Meeting meeting;
  float value[32];
  const uint16_t* row[32];
  uint32_t a[32][4], b[32][2];
};

struct Block {
  int x = 0;
  Meeting meeting;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
};

struct Machine {
  static constexpr size_t kStack = 128 * 1024;
  std::vector<Thread> threads;  // of all blocks that run at once, block by block
  std::vector<Block> blocks;
  Meeting everybody;
  ucontext_t scheduler;
  int current = 0, block_threads = 0, grid = 0;
  std::mt19937 random;
  std::function<void()> body;
  long steps = 0;  // switches since some meeting was completed

  static Machine& one() {
    static Machine m;
    return m;
  }

  static void entry() {
    Machine& m = one();
    m.body();
    m.threads[m.current].done = true;
    swapcontext(&m.threads[m.current].context, &m.scheduler);
  }

  void give_way() { swapcontext(&threads[current].context, &scheduler); }

  void meet(Meeting& at) {
    const long round = at.round;
    if (++at.arrived == at.size) {
      at.arrived = 0;
      ++at.round;
      steps = 0;
      return;
    }
    while (at.round == round) give_way();
  }

  void start_thread(Thread& t, int index) {
    t.index = index % block_threads;
    t.block = &blocks[index / block_threads];
    t.done = false;
    t.open.clear();
    t.groups.clear();
    if (!t.stack) t.stack.reset(new char[kStack]);
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.get();
    t.context.uc_stack.ss_size = kStack;
    t.context.uc_link = &scheduler;
    makecontext(&t.context, &Machine::entry, 0);
  }

  // Runs `count` blocks at once, from block `first` on.
  void run_blocks(int first, int count, int64_t shared_bytes) {
    blocks.resize(count);
    threads.resize(static_cast<size_t>(count) * block_threads);
    everybody = Meeting{static_cast<int>(threads.size()), 0, 0};
    for (int i = 0; i < count; ++i) {
      Block& b = blocks[i];
      b.x = first + i;
      b.meeting = Meeting{block_threads, 0, 0};
      b.warps.resize(block_threads / 32);
      for (Warp& w : b.warps) w.meeting = Meeting{32, 0, 0};
      b.shared.assign(shared_bytes, 0xff);
    }
    for (size_t i = 0; i < threads.size(); ++i) start_thread(threads[i], static_cast<int>(i));
    schedule();
  }

  // Whole warps in random order, so that most switches find the other 31 lanes ready.
  void schedule() {
    std::vector<int> left;
    for (size_t w = 0; w < threads.size() / 32; ++w) left.push_back(static_cast<int>(w));
    steps = 0;
    while (!left.empty()) {
      const size_t pick = random() % left.size();
      const int warp = left[pick];
      const int turn = random() % 32;
      bool all_done = true;
      for (int i = 0; i < 32; ++i) {
        current = warp * 32 + (i + turn) % 32;
        if (threads[current].done) continue;
        swapcontext(&scheduler, &threads[current].context);
        all_done = all_done && threads[current].done;
      }
      if (all_done) left.erase(left.begin() + static_cast<long>(pick));
      if (++steps > 100000) throw std::runtime_error("deadlock: threads wait at different barriers");
    }
  }
};

inline Machine& m() { return Machine::one(); }
inline Thread& me() { return m().threads[m().current]; }
inline int lane() { return me().index % 32; }
inline Warp& warp() { return me().block->warps[me().index / 32]; }

inline void check_shared(const void* p, size_t bytes) {
  const unsigned char* at = static_cast<const unsigned char*>(p);
  const std::vector<unsigned char>& shared = me().block->shared;
  const unsigned char* base = shared.data();
  if (at < base || at + bytes > base + shared.size()) throw std::runtime_error("outside shared memory");
  if ((at - base) % bytes != 0) throw std::runtime_error("misaligned in shared memory");
}

// Runs a kernel body over a grid; `together`: all blocks at once, as a cooperative launch does.
inline void launch(int grid, int threads, int64_t shared_bytes, bool together, uint32_t seed,
                   std::function<void()> body) {
  Machine& machine = m();
  machine.grid = grid;
  machine.block_threads = threads;
  machine.random.seed(seed);
  machine.body = std::move(body);
  if (together) return machine.run_blocks(0, grid, shared_bytes);
  for (int x = 0; x < grid; ++x) machine.run_blocks(x, 1, shared_bytes);
}

inline void gather_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
  check_shared(row, 16);
  const int l = lane();
  Warp& w = warp();
  w.row[l] = static_cast<const uint16_t*>(row);
  m().meet(w.meeting);
  for (int i = 0; i < 4; ++i) {
    const int major = l / 4, minor = l % 4 * 2;
    const uint16_t low = transposed ? w.row[8 * i + minor][major] : w.row[8 * i + major][minor];
    const uint16_t high = transposed ? w.row[8 * i + minor + 1][major] : w.row[8 * i + major][minor + 1];
    r[i] = low | static_cast<uint32_t>(high) << 16;
  }
  m().meet(w.meeting);
}

template <class T>
float element(uint32_t word, int which) {
  return which ? T::high(word) : T::low(word);
}

template <class T>
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Warp& w = warp();
  const int l = lane();
  std::memcpy(w.a[l], a, sizeof(a));
  w.b[l][0] = b0;
  w.b[l][1] = b1;
  m().meet(w.meeting);
  for (int e = 0; e < 4; ++e) {
    const int row = l / 4, column = l % 4 * 2 + e % 2, lower = e / 2;
    for (int k = 0; k < 16; ++k) {
      const int far = k / 8, holder = k % 8 / 2;
      const float x = element<T>(w.a[row * 4 + holder][far * 2 + lower], k % 2);
      const float y = element<T>(w.b[column * 4 + holder][far], k % 2);
      c[e] += x * y;
    }
  }
  m().meet(w.meeting);
}

}  // namespace emulated

inline unsigned char* shared_memory() { return emulated::me().block->shared.data(); }
inline int thread_index() { return emulated::me().index; }
inline int thread_count() { return emulated::m().block_threads; }
inline int block_x() { return emulated::me().block->x; }
inline int grid_blocks() { return emulated::m().grid; }
// IDCORE_EMULATE_NO_BARRIER leaves barriers out: shows that the tests notice.
inline void sync_block() {
#if !defined(IDCORE_EMULATE_NO_BARRIER)
  emulated::m().meet(emulated::me().block->meeting);
#endif
}
inline void sync_grid() {
#if !defined(IDCORE_EMULATE_NO_GRID_BARRIER)
  emulated::m().meet(emulated::m().everybody);
#endif
}
inline void sync_warp() { emulated::m().meet(emulated::warp().meeting); }

inline float exchange_xor(float v, int lanes) {
  emulated::Warp& w = emulated::warp();
  w.value[emulated::lane()] = v;
  emulated::m().meet(w.meeting);
  const float got = w.value[emulated::lane() ^ lanes];
  emulated::m().meet(w.meeting);
  return got;
}

inline void copy16_async(void* shared, const void* global, bool valid) {
  emulated::check_shared(shared, 16);
  if (reinterpret_cast<uintptr_t>(global) % 16)
    throw std::runtime_error("misaligned copy from global memory");
  emulated::me().open.push_back({shared, global, valid});
}
inline void commit_copies() {
  emulated::me().groups.push_back(std::move(emulated::me().open));
  emulated::me().open.clear();
}
template <int kPending>
void wait_copies() {
  auto& groups = emulated::me().groups;
  while (groups.size() > static_cast<size_t>(kPending)) {
    for (const emulated::Copy& c : groups.front()) {
      if (c.valid) {
        std::memcpy(c.to, c.from, 16);
      } else {
        std::memset(c.to, 0, 16);
      }
    }
    groups.pop_front();
  }
}

inline void load_matrices(uint32_t (&r)[4], const void* row) { emulated::gather_matrices(r, row, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  emulated::gather_matrices(r, row, true);
}
inline float exp2_fast(float x) { return exp2f(x); }

struct Half {
  static uint32_t pack(float e0, float e1) {
    return _cvtss_sh(e0, _MM_FROUND_TO_NEAREST_INT) |
           static_cast<uint32_t>(_cvtss_sh(e1, _MM_FROUND_TO_NEAREST_INT)) << 16;
  }
  static float low(uint32_t w) { return one(static_cast<uint16_t>(w)); }
  static float high(uint32_t w) { return one(static_cast<uint16_t>(w >> 16)); }
  static float one(uint16_t bits) { return _cvtsh_ss(bits); }
  static void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulated::multiply<Half>(c, a, b0, b1);
  }
};

struct BFloat16 {
  static uint16_t round(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    if (std::isnan(f)) return static_cast<uint16_t>(u >> 16 | 0x40);
    return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  static uint32_t pack(float e0, float e1) { return round(e0) | static_cast<uint32_t>(round(e1)) << 16; }
  static float low(uint32_t w) { return one(static_cast<uint16_t>(w)); }
  static float high(uint32_t w) { return one(static_cast<uint16_t>(w >> 16)); }
  static float one(uint16_t bits) {
    const uint32_t u = static_cast<uint32_t>(bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
  }
  static void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulated::multiply<BFloat16>(c, a, b0, b1);
  }
};

}  // namespace cuda
}  // namespace idcore

#define IDCORE_DEVICE inline
#define IDCORE_UNROLL
#define IDCORE_NO_UNROLL
#define IDCORE_UNROLL_BY_4
