// How one call of `id_attention` is cut into blocks, what shared and scratch memory it needs, and whether one
// launch does it. Host code, no CUDA header.
#pragma once

#include <cstdint>

#include "id_attention.h"

#if defined(__CUDACC__)
#define IDCORE_BOTH_SIDES __host__ __device__
#else
#define IDCORE_BOTH_SIDES
#endif

namespace idcore {
namespace cuda {

struct Limits {
  int32_t multiprocessors;
  int32_t shared_bytes;  // of one block, at most
  int32_t shared_all;    // of one multiprocessor
  bool cooperative;      // can launch a grid whose blocks wait for each other
};

struct Sizes {
  int32_t warps;   // of a block of attend_kernel
  int32_t chunks;  // tiles along the rows
  int32_t tiles;
  int32_t grid;         // blocks of attend_kernel
  int32_t slots;        // tiles that a block holds in shared memory
  int32_t slot_offset;  // bytes before the first
  int32_t shared_bytes;
  bool together;  // one launch: blocks wait for each other and finish ortho themselves
  int64_t text_bytes, share_bytes, sums_bytes;
  int64_t total() const { return text_bytes + share_bytes + sums_bytes; }
};

constexpr int64_t round_up_256(int64_t bytes) { return (bytes + 255) / 256 * 256; }

inline bool two_passes(const IdAttentionParams& p) { return p.merge != Merge::kAdd && p.num_identities > 0; }

// Most warps a block of attend_kernel has, and blocks that a multiprocessor's registers hold: what the launch
// bounds say. Two passes and wider heads need more registers a thread; with six warps two blocks still fit,
// and nothing spills.
constexpr int max_warps(int64_t head_dim, bool two) { return two || head_dim == 80 ? 6 : 8; }
constexpr int blocks_per_multiprocessor(int64_t head_dim, bool two) {
  return head_dim <= (two ? 64 : 80) ? 2 : 1;
}

// Keys and values wait in shared memory in stages of 32: one in use, two being filled.
constexpr int kStages = 3;
constexpr int kStageKeys = 32;

// Shared memory of a block of attend_kernel: the stages, with two passes every warp's
// part of the sums, then the slots: of each warp its rows and its running result.
constexpr int64_t row_pitch(int64_t head_dim) { return (head_dim + 15) / 16 * 16 + 8; }
constexpr int64_t stage_bytes(int64_t head_dim) { return kStages * 2 * 2 * kStageKeys * row_pitch(head_dim); }
constexpr int64_t slot_bytes(int64_t head_dim, int64_t warps) {
  return warps * 16 * (2 * row_pitch(head_dim) + 4 * head_dim);
}

// Floats of scratch for the sum over tiles.
IDCORE_BOTH_SIDES constexpr int merging_scratch(int n, int dim, int threads) {
  return n * 2 * dim > 4 * threads ? n * 2 * dim : 4 * threads;
}
constexpr int64_t merging_bytes(int n, int64_t head_dim, int rows, int threads) {
  return 4 * (merging_scratch(n, static_cast<int>(head_dim), threads) + n * (head_dim + rows));
}

// The step behind the barrier takes the memory of the stages and of the sums.
inline int64_t slot_offset(const IdAttentionParams& p, int warps) {
  const int64_t stages = stage_bytes(p.head_dim);
  if (!two_passes(p)) return stages;
  const int64_t sums = stages + 4 * warps * 2 * p.head_dim;
  const int64_t merge = (merging_bytes(p.num_identities, p.head_dim, warps * 16, warps * 32) + 15) / 16 * 16;
  return sums > merge ? sums : merge;
}

inline int64_t chunks_of(const IdAttentionParams& p, int warps) {
  return (p.lq + warps * 16 - 1) / (warps * 16);
}

inline Sizes complete(const IdAttentionParams& p, int warps, int64_t grid, int64_t slots, bool together) {
  Sizes s{};
  s.warps = warps;
  s.chunks = static_cast<int32_t>(chunks_of(p, warps));
  s.tiles = static_cast<int32_t>(s.chunks * p.heads * p.batch);
  s.grid = together ? static_cast<int32_t>(grid) : s.tiles;
  s.slots = static_cast<int32_t>(slots);
  s.slot_offset = static_cast<int32_t>(slot_offset(p, warps));
  s.shared_bytes = static_cast<int32_t>(s.slot_offset + slots * slot_bytes(p.head_dim, warps));
  s.together = together;
  if (!two_passes(p)) return s;
  const int64_t heads = p.batch * p.heads;
  const bool leaves = !together || s.tiles > static_cast<int64_t>(s.grid) * slots;
  s.text_bytes = leaves ? round_up_256(2 * heads * p.lq * p.head_dim) : 0;
  s.share_bytes = p.merge == Merge::kOrthoV2 ? round_up_256(4 * p.num_identities * heads * p.lq) : 0;
  s.sums_bytes = round_up_256(4 * 2 * s.chunks * p.num_identities * heads * p.head_dim);
  return s;
}

// One tile a block. Blocks go to multiprocessors as these become free, so what counts is how much the busiest
// of them gets: that much in whole blocks, one more warp a block for the reads of K and V that its warps
// share (our choice). Of equals the larger block, which reads less; shared memory may be short (99 KB on
// sm_89).
inline Sizes plan_apart(const IdAttentionParams& p, const Limits& limits) {
  const int64_t processors = limits.multiprocessors > 0 ? limits.multiprocessors : 1;
  int best = 1;
  int64_t least = INT64_MAX;
  for (int warps = max_warps(p.head_dim, two_passes(p)); warps > 0; --warps) {
    if (slot_offset(p, warps) + slot_bytes(p.head_dim, warps) > limits.shared_bytes) continue;
    const int64_t tiles = chunks_of(p, warps) * p.heads * p.batch;
    const int64_t cost = (tiles + processors - 1) / processors * (warps + 1);
    if (cost >= least) continue;
    least = cost;
    best = warps;
  }
  return complete(p, best, 0, 1, false);
}

// Slots that a block of so many tiles needs at least. Copies run two stages ahead, so where a tile is one
// stage long the queries of the tile after the next arrive while this one is in use.
inline int least_slots(const IdAttentionParams& p, int64_t rounds) {
  int64_t stages = (p.lt + kStageKeys - 1) / kStageKeys;
  for (int j = 0; j < p.num_identities; ++j) stages += p.identity[j].length > 0;
  const int least = stages == 1 ? 3 : 2;
  return rounds < least ? static_cast<int>(rounds) : least;
}

// Of a block that has several tiles: fewer warps leave nothing to do while one waits for memory. Our choice.
constexpr int kLeastWarps = 4;

// One launch of as many blocks as run at once, each with several tiles; false where too little of the result
// would stay on the chip. The best block size keeps the multiprocessors busy with the fewest rounds of warps;
// the cost of one more warp a round per tile, and a quarter of the tiles on the chip, are our choice.
inline bool plan_together(const IdAttentionParams& p, const Limits& limits, Sizes* best) {
  if (!limits.cooperative || !two_passes(p) || limits.multiprocessors == 0) return false;
  const int per = blocks_per_multiprocessor(p.head_dim, true);
  const int64_t resident = static_cast<int64_t>(per) * limits.multiprocessors;
  int64_t room = limits.shared_all / per - 1024;  // the driver takes 1 KB a block
  if (room > limits.shared_bytes) room = limits.shared_bytes;
  int64_t least = INT64_MAX;
  for (int warps = max_warps(p.head_dim, true); warps > 0; --warps) {
    const int64_t tiles = chunks_of(p, warps) * p.heads * p.batch;
    const int64_t rounds = (tiles + resident - 1) / resident, grid = (tiles + rounds - 1) / rounds;
    const int64_t fit = (room - slot_offset(p, warps)) / slot_bytes(p.head_dim, warps);
    const int64_t slots = fit < rounds ? fit : rounds;  // more would stay empty
    if (rounds > 1 && warps < kLeastWarps) continue;
    if (slots < least_slots(p, rounds) || rounds > 4 * slots || rounds * (warps + 1) >= least) continue;
    least = rounds * (warps + 1);
    *best = complete(p, warps, grid, slots, true);
  }
  return least != INT64_MAX;
}

// `resident`: blocks of attend_kernel that the device holds at once, asked with a plan; a plan for one launch
// that would not fit is not taken.
template <class Resident>
Sizes plan(const IdAttentionParams& p, const Limits& limits, Resident resident) {
  Sizes s{};
  if (plan_together(p, limits, &s) && resident(s) >= s.grid) return s;
  return plan_apart(p, limits);
}

inline bool aligned16(const HeadTensor& t) {
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.stride_batch % 8 == 0 && t.stride_head % 8 == 0 &&
         t.stride_row % 8 == 0;
}

// True where all rows of q, K, V and out start at multiples of 16 bytes.
inline bool all_aligned(const IdAttentionParams& p) {
  bool all = aligned16(p.q) && aligned16(p.k_text) && aligned16(p.v_text) && aligned16(p.out);
  all = all && p.stage.k_stride % 8 == 0 && p.stage.v_stride % 8 == 0;
  for (int j = 0; j < p.num_identities; ++j)
    all = all && aligned16(p.identity[j].k) && aligned16(p.identity[j].v);
  return all;
}

}  // namespace cuda
}  // namespace idcore
