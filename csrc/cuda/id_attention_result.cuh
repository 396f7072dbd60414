// What becomes of a tile of `id_attention`: its sums, its running result, its way to memory, and behind the
// barrier over the grid the last step of the tiles that stayed on the chip.
#pragma once

#include "cuda/id_attention_merge.cuh"
#include "cuda/id_attention_stream.cuh"

namespace idcore {
namespace cuda {

// What a warp knows while it works on one tile.
struct Turn {
  Spot spot;
  int slot;
  int row;  // the warp's first
  int warp, lane;
};

IDCORE_DEVICE Turn turn_of(const Spot& spot, int slot) {
  const int warps = thread_count() / 32, warp = thread_index() / 32;
  return {spot, slot, (spot.chunk * warps + warp) * kWarpRows, warp, thread_index() % 32};
}

// Sums over a warp's rows of w h i and w h h into the table [warps, 2, D].
template <class T, int kHeadDim>
IDCORE_DEVICE void add_rows(const float (&i)[Geometry<kHeadDim>::kTiles][4], const uint16_t* h_rows,
                            float* table, const float (&w)[2], const Turn& at) {
  using G = Geometry<kHeadDim>;
  const uint16_t* from = h_rows + (at.lane >> 2) * G::kPitch + (at.lane & 3) * 2;
  IDCORE_UNROLL
  for (int tile = 0; tile < G::kTiles; ++tile) {
    float num[2] = {0.f, 0.f}, den[2] = {0.f, 0.f};
    IDCORE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const uint32_t word = *reinterpret_cast<const uint32_t*>(from + half * 8 * G::kPitch + tile * 8);
      const float h[2] = {T::low(word), T::high(word)};
      IDCORE_UNROLL
      for (int e = 0; e < 2; ++e) {
        num[e] += w[half] * h[e] * i[tile][2 * half + e];
        den[e] += w[half] * h[e] * h[e];
      }
    }
    IDCORE_UNROLL
    for (int e = 0; e < 2; ++e) {
      IDCORE_UNROLL
      for (int lanes = 4; lanes < 32; lanes *= 2) {
        num[e] += exchange_xor(num[e], lanes);
        den[e] += exchange_xor(den[e], lanes);
      }
      if (at.lane < 4) {
        const int channel = tile * 8 + at.lane * 2 + e;
        table[(at.warp * 2 + 0) * kHeadDim + channel] = num[e];
        table[(at.warp * 2 + 1) * kHeadDim + channel] = den[e];
      }
    }
  }
}

// Sums over the tile's rows: over the warps' in a fixed order.
template <int kHeadDim>
IDCORE_DEVICE void store_sums(const float* table, const Task& task, const Turn& at, int j) {
  sync_block();
  const int warps = thread_count() / 32;
  const int64_t which =
      (static_cast<int64_t>(at.spot.pair) * task.chunks + at.spot.chunk) * task.p.num_identities + j;
  for (int c = thread_index(); c < 2 * kHeadDim; c += thread_count()) {
    float total = 0.f;
    for (int from_warp = 0; from_warp < warps; ++from_warp) total += table[from_warp * 2 * kHeadDim + c];
    task.sums[which * 2 * kHeadDim + c] = total;
  }
  sync_block();
}

// The running result X waits in shared memory, in slots of its own for each lane: in registers, two blocks
// would not fit on a multiprocessor.
template <int kTiles>
IDCORE_DEVICE void put_aside(float* aside, const float (&x)[kTiles][4], int lane) {
  IDCORE_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) {
    IDCORE_UNROLL
    for (int e = 0; e < 4; ++e) aside[(tile * 4 + e) * 32 + lane] = x[tile][e];
  }
}

// x becomes X + gain x.
template <int kTiles>
IDCORE_DEVICE void add_to(const float* aside, float (&x)[kTiles][4], const float (&gain)[2], int lane) {
  IDCORE_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) {
    IDCORE_UNROLL
    for (int e = 0; e < 4; ++e) x[tile][e] = aside[(tile * 4 + e) * 32 + lane] + gain[e / 2] * x[tile][e];
  }
}

// The tile's result to memory; with kTwo, X and h.
template <class T, int kHeadDim, bool kTwo>
IDCORE_DEVICE void leave_chip(const float (&x)[Geometry<kHeadDim>::kTiles][4], uint16_t* rows,
                              const Task& task, const Turn& at) {
  const IdAttentionParams& p = task.p;
  const int lq = static_cast<int>(p.lq);
  sync_warp();
  if (kTwo) {
    uint16_t* h = task.text + static_cast<int64_t>(at.spot.pair) * p.lq * kHeadDim;
    write_rows<kHeadDim>(h, kHeadDim, rows, at.row, lq, true, at.lane);
    sync_warp();
  }
  stage<T, kHeadDim>(rows, x, at.lane);
  sync_warp();
  uint16_t* out = const_cast<uint16_t*>(head_of(p.out, p.batch, at.spot));
  write_rows<kHeadDim>(out, p.out.stride_row, rows, at.row, lq, task.aligned, at.lane);
}

// After the barrier over the grid: a tile that stayed on the chip. out = X + sum_j s_j w_j beta_j alpha_j h.
template <class T, int kHeadDim>
IDCORE_DEVICE void finish_tile(const Task& task, const Room<kHeadDim>& room, const Turn& at,
                               const float* alpha, const float* factor) {
  using G = Geometry<kHeadDim>;
  const IdAttentionParams& p = task.p;
  uint16_t* const rows = room.rows(at.slot) + at.warp * G::kRowElements;
  const float* aside = room.aside(at.slot, at.warp) + at.lane;
  const int tile_rows = room.warps * kWarpRows;
  for (int half = 0; half < 2; ++half) {
    const int row = (at.lane >> 2) + half * 8;
    uint16_t* to = rows + row * G::kPitch + (at.lane & 3) * 2;
    const float* weight = factor + at.warp * kWarpRows + row;
    for (int tile = 0; tile < G::kTiles; ++tile) {
      uint32_t* word = reinterpret_cast<uint32_t*>(to + tile * 8);
      const float* x = aside + (tile * 4 + 2 * half) * 32;
      const float* ratio = alpha + tile * 8 + (at.lane & 3) * 2;
      float low = 0.f, high = 0.f;
      for (int j = 0; j < p.num_identities; ++j) {
        low += weight[j * tile_rows] * ratio[j * kHeadDim];
        high += weight[j * tile_rows] * ratio[j * kHeadDim + 1];
      }
      *word = T::pack(x[0] + low * T::low(*word), x[32] + high * T::high(*word));
    }
  }
  sync_warp();
  uint16_t* out = const_cast<uint16_t*>(head_of(p.out, p.batch, at.spot));
  write_rows<kHeadDim>(out, p.out.stride_row, rows, at.row, static_cast<int>(p.lq), task.aligned, at.lane);
}

template <class T, int kHeadDim>
IDCORE_DEVICE void finish_tiles(const Task& task, const Room<kHeadDim>& room, int begin, int end) {
  const int tile_rows = room.warps * kWarpRows, n = task.p.num_identities;
  const Merging m = merging(room.base, n, kHeadDim, thread_count());
  int pair = -1;
  for (int tile = begin; tile < end; ++tile) {
    const Turn at = turn_of(spot_of(task, tile), (tile - begin) % task.slots);
    if (at.spot.pair != pair) load_ratios(task, m, at.spot.pair, kHeadDim);
    pair = at.spot.pair;
    load_factors(task, m.factor, at.spot, at.spot.chunk * tile_rows, tile_rows);
    sync_block();
    if (tile < end - task.slots) {
      merge_rows<T>(task, m, at.spot, at.spot.chunk * tile_rows, tile_rows, kHeadDim);
    } else {
      finish_tile<T, kHeadDim>(task, room, at, m.alpha, m.factor);
    }
    sync_block();
  }
}

}  // namespace cuda
}  // namespace idcore
