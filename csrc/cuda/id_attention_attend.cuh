// The attention kernel of `id_attention`. A block walks through its tiles; for each, through the text's keys,
// then each identity's. "add" is finished there. ortho and ortho_v2 depend on sums over all image rows: each
// tile leaves X = h + sum_j s_j w_j i_j, h, its rows' shares and its sums of w h i and w h h. Where all
// blocks run at once, X and h of a block's last tiles stay in shared memory across a barrier over the grid,
// and the same launch applies the ratio alpha and the share a; else merge_kernel does
// (id_attention_merge.cuh). Sums are added in a fixed order, so that the result is the same in every run.
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

template <class T, int kHeadDim>
IDCORE_DEVICE void add_bias(float (&s)[2 * Geometry<kHeadDim>::kPairs][4], const IdAttentionParams& p,
                            const Turn& at, int first, int count, float root) {
  const TextBias& bias = p.text_bias;
  const int64_t base = at.spot.b * bias.stride_batch + at.spot.head * bias.stride_head;
  IDCORE_UNROLL
  for (int tile = 0; tile < 2 * Geometry<kHeadDim>::kPairs; ++tile) {
    IDCORE_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int key = tile * 8 + (at.lane & 3) * 2 + (e & 1);
      const int64_t r = at.row + (at.lane >> 2) + (e >> 1) * 8;
      if (key >= count || r >= p.lq) continue;
      const int64_t from = base + r * bias.stride_row + (first + key) * bias.stride_token;
      const float value = bias.dtype == DType::kFloat32
                              ? static_cast<const float*>(bias.data)[from]
                              : T::one(static_cast<const uint16_t*>(bias.data)[from]);
      s[tile][e] += value * root;  // the products are divided by sqrt(D) later
    }
  }
}

// Softmax state before any key: the zero tokens, whose logit is 0.
IDCORE_DEVICE void start_branch(RowState& state, int branch, const IdAttentionParams& p, int lane) {
  const int zeros = branch == 0 ? 0 : p.num_zero;
  const int beyond = branch == 0 ? 0 : p.num_global - branch_length(p, branch);
  const int counted = beyond < 0 ? 0 : beyond < zeros ? beyond : zeros;
  IDCORE_UNROLL
  for (int half = 0; half < 2; ++half) {
    state.top[half] = zeros > 0 ? 0.f : -INFINITY;
    // The four lanes of a row add up their sums in the end, so one of them starts with the zero tokens.
    state.sum[half] = (lane & 3) == 0 ? static_cast<float>(zeros) : 0.f;
    state.sum_unscaled[half] = state.sum[half];
    state.first[half] = (lane & 3) == 0 ? static_cast<float>(counted) : 0.f;
  }
}

// One branch's keys: acc becomes the sum of weights times values, not yet divided by the weights' sum.
template <class T, int kHeadDim, bool kTwo>
IDCORE_DEVICE void walk_keys(float (&acc)[Geometry<kHeadDim>::kTiles][4], RowState& state,
                             uint32_t (&q)[Geometry<kHeadDim>::kSteps][4], const Task& task,
                             const Room<kHeadDim>& room, Cursor& next, int& stage, const Turn& at,
                             int branch) {
  using G = Geometry<kHeadDim>;
  const IdAttentionParams& p = task.p;
  const float root = sqrtf(static_cast<float>(kHeadDim));
  const int length = branch_length(p, branch);
  for (int first = 0; first < length; first += G::kKeys, stage = after(stage)) {
    wait_copies<1>();
    sync_block();
    fetch<kHeadDim, kTwo>(task, next, room);  // into the stage that was used last
    if (branch == 0 && first == 0)
      load_query<kHeadDim>(q, room.rows(at.slot) + at.warp * G::kRowElements, at.lane);
    const uint16_t* k = room.stage(stage);
    const int count = length - first;
    float s[2 * G::kPairs][4];
    score<T, kHeadDim>(s, q, k, count, at.lane);
    if (branch == 0 && p.text_bias.data) add_bias<T, kHeadDim>(s, p, at, first, count, root);
    if (kTwo && branch > 0 && p.merge == Merge::kOrthoV2) {
      weigh<kHeadDim, true>(s, acc, state, kLog2E / root, p.num_global - first, root, at.lane);
    } else {
      weigh<kHeadDim, false>(s, acc, state, kLog2E / root, 0, root, at.lane);
    }
    apply<T, kHeadDim>(acc, s, k + G::kKeys * G::kPitch, count, at.lane);
  }
}

// Divides by the softmax's sum and stores each row's share.
template <int kHeadDim, bool kTwo>
IDCORE_DEVICE void finish_branch(float (&acc)[Geometry<kHeadDim>::kTiles][4], const RowState& state,
                                 const Task& task, const Turn& at, int branch) {
  const IdAttentionParams& p = task.p;
  IDCORE_UNROLL
  for (int half = 0; half < 2; ++half) {
    const float inverse = 1.f / row_sum(state.sum[half]);
    IDCORE_UNROLL
    for (int tile = 0; tile < Geometry<kHeadDim>::kTiles; ++tile) {
      acc[tile][2 * half] *= inverse;
      acc[tile][2 * half + 1] *= inverse;
    }
    if (kTwo && branch > 0 && p.merge == Merge::kOrthoV2) {
      const float got = row_sum(state.first[half]) / row_sum(state.sum_unscaled[half]);
      const int64_t r = at.row + (at.lane >> 2) + half * 8;
      const int64_t plane = (branch - 1) * p.batch * p.heads + at.spot.pair;
      if ((at.lane & 3) == 0 && r < p.lq) task.share[plane * p.lq + r] = got;
    }
  }
}

// Sums over the tile's rows of w h i and w h h: first over a warp's rows, then over its warps.
template <class T, int kHeadDim>
IDCORE_DEVICE void store_sums(const float (&i)[Geometry<kHeadDim>::kTiles][4], const uint16_t* h_rows,
                              float* table, const float (&w)[2], const Task& task, const Turn& at, int j) {
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

// x becomes X + s w x.
template <int kTiles>
IDCORE_DEVICE void add_to(const float* aside, float (&x)[kTiles][4], float scale, const float (&w)[2],
                          int lane) {
  IDCORE_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) {
    IDCORE_UNROLL
    for (int e = 0; e < 4; ++e)
      x[tile][e] = aside[(tile * 4 + e) * 32 + lane] + scale * w[e / 2] * x[tile][e];
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

template <class T, int kHeadDim, bool kTwo>
IDCORE_DEVICE void attend_tile(const Task& task, const Room<kHeadDim>& room, Cursor& next, int& stage_in_use,
                               const Turn& at, bool stays) {
  using G = Geometry<kHeadDim>;
  const IdAttentionParams& p = task.p;
  uint16_t* const rows = room.rows(at.slot) + at.warp * G::kRowElements;
  float* const aside = room.aside(at.slot, at.warp);
  uint32_t q[G::kSteps][4];
  float acc[G::kTiles][4];
  for (int branch = 0; branch <= p.num_identities; ++branch) {
    RowState state;
    start_branch(state, branch, p, at.lane);
    IDCORE_UNROLL
    for (int tile = 0; tile < G::kTiles; ++tile) {
      IDCORE_UNROLL
      for (int e = 0; e < 4; ++e) acc[tile][e] = 0.f;
    }
    walk_keys<T, kHeadDim, kTwo>(acc, state, q, task, room, next, stage_in_use, at, branch);
    finish_branch<kHeadDim, kTwo>(acc, state, task, at, branch);
    if (branch == 0) {
      if (kTwo) stage<T, kHeadDim>(rows, acc, at.lane);
      if (kTwo) sync_warp();
    } else {
      const Identity& id = p.identity[branch - 1];
      const int64_t b = at.spot.b, row = at.row + (at.lane >> 2);
      const float w[2] = {mask_at(id, b, row, p.lq), mask_at(id, b, row + 8, p.lq)};
      if (kTwo) store_sums<T, kHeadDim>(acc, rows, room.table(), w, task, at, branch - 1);
      add_to(aside, acc, scale_of(id, b), w, at.lane);
    }
    if (kTwo ? stays || branch < p.num_identities : branch < p.num_identities) put_aside(aside, acc, at.lane);
  }
  if (!stays) leave_chip<T, kHeadDim, kTwo>(acc, rows, task, at);
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

IDCORE_DEVICE Turn turn_of(const Task& task, int tile, int slot) {
  const int warps = thread_count() / 32, warp = thread_index() / 32;
  const Spot spot = spot_of(task, tile);
  return {spot, slot, (spot.chunk * warps + warp) * kWarpRows, warp, thread_index() % 32};
}

template <class T, int kHeadDim>
IDCORE_DEVICE void finish_tiles(const Task& task, const Room<kHeadDim>& room, int begin, int end) {
  const int tile_rows = room.warps * kWarpRows, n = task.p.num_identities;
  const Merging m = merging(room.base, n, kHeadDim, thread_count());
  int pair = -1;
  for (int tile = begin; tile < end; ++tile) {
    const Turn at = turn_of(task, tile, (tile - begin) % task.slots);
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

// 32 * warps threads. kTwo: ortho and ortho_v2.
template <class T, int kHeadDim, bool kTwo>
IDCORE_DEVICE void attend(const Task& task) {
  const Room<kHeadDim> room = {shared_memory(), shared_memory() + task.slot_offset, thread_count() / 32};
  const int begin = kTwo ? first_tile(task, block_x()) : block_x();
  const int end = kTwo ? first_tile(task, block_x() + 1) : begin + 1;
  Cursor next = start_of<kHeadDim>(task, begin, end);
  for (int ahead = 0; ahead + 1 < kStages; ++ahead) fetch<kHeadDim, kTwo>(task, next, room);
  int stage_in_use = 0;
  for (int tile = begin; tile < end; ++tile) {
    const Turn at = turn_of(task, tile, kTwo ? (tile - begin) % task.slots : 0);
    const bool stays = kTwo && task.together && tile >= end - task.slots;
    attend_tile<T, kHeadDim, kTwo>(task, room, next, stage_in_use, at, stays);
  }
  if (!kTwo || !task.together) return;
  sync_grid();
  finish_tiles<T, kHeadDim>(task, room, begin, end);
}

}  // namespace cuda
}  // namespace idcore
