// The attention kernel of `id_attention`. A block walks through its tiles; for each, through the text's keys,
// then each identity's. "add" is finished there. ortho and ortho_v2 depend on sums over all image rows: each
// tile leaves X = h + sum_j s_j w_j i_j, h, its rows' shares and its sums of w h i and w h h. Where all
// blocks run at once, X and h of a block's last tiles stay in shared memory across a barrier over the grid,
// and the same launch applies the ratio alpha and the share a; else merge_kernel does
// (id_attention_merge.cuh). Sums are added in a fixed order, so that the result is the same in every run.
#pragma once

#include "cuda/id_attention_result.cuh"

namespace idcore {
namespace cuda {

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

template <int kTiles>
IDCORE_DEVICE void clear(float (&acc)[kTiles][4]) {
  IDCORE_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) {
    IDCORE_UNROLL
    for (int e = 0; e < 4; ++e) acc[tile][e] = 0.f;
  }
}

// True where an identity's values can be added to X as they are weighed: "add" with one block of keys, whose
// sums are known before its values are needed.
template <bool kTwo>
IDCORE_DEVICE bool adds_directly(const IdAttentionParams& p, int branch) {
  return !kTwo && branch > 0 && branch_length(p, branch) > 0 && branch_length(p, branch) <= kStageKeys;
}

// Of the thread's two rows, the identity's mask times `scale`.
IDCORE_DEVICE void row_gain(float (&gain)[2], const IdAttentionParams& p, const Turn& at, int j,
                            float scale) {
  const int64_t row = at.row + (at.lane >> 2);
  gain[0] = scale * mask_at(p.identity[j], at.spot.b, row, p.lq);
  gain[1] = scale * mask_at(p.identity[j], at.spot.b, row + 8, p.lq);
}

// One branch's keys: acc becomes the sum of weights times values, not yet divided by the weights' sum; or,
// where the branch adds directly, acc += gain times the attention.
template <class T, int kHeadDim, bool kTwo>
IDCORE_DEVICE void walk_keys(float (&acc)[Geometry<kHeadDim>::kTiles][4], RowState& state,
                             uint32_t (&q)[Geometry<kHeadDim>::kSteps][4], const Task& task,
                             const Room<kHeadDim>& room, Cursor& next, int& stage, const Turn& at, int branch,
                             const float (&gain)[2]) {
  using G = Geometry<kHeadDim>;
  const IdAttentionParams& p = task.p;
  const float root = sqrtf(static_cast<float>(kHeadDim));
  const int length = branch_length(p, branch);
  const bool direct = adds_directly<kTwo>(p, branch);
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
      weigh<kHeadDim, true>(s, acc, state, kLog2E / root, p.num_global - first, root, at.lane, false);
    } else {
      weigh<kHeadDim, false>(s, acc, state, kLog2E / root, 0, root, at.lane, direct);
    }
    if (direct) weigh_to<kHeadDim>(s, state, gain);
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
    const bool direct = adds_directly<kTwo>(p, branch);
    float gain[2] = {1.f, 1.f};
    if (direct) row_gain(gain, p, at, branch - 1, scale_of(p.identity[branch - 1], at.spot.b));
    if (!direct && branch > 0) put_aside(aside, acc, at.lane);
    if (!direct) clear(acc);
    RowState state;
    start_branch(state, branch, p, at.lane);
    walk_keys<T, kHeadDim, kTwo>(acc, state, q, task, room, next, stage_in_use, at, branch, gain);
    if (direct) continue;
    finish_branch<kHeadDim, kTwo>(acc, state, task, at, branch);
    if (branch == 0) {
      if (kTwo) stage<T, kHeadDim>(rows, acc, at.lane);
      if (kTwo) sync_warp();
      continue;
    }
    if (kTwo) {
      row_gain(gain, p, at, branch - 1, 1.f);
      add_rows<T, kHeadDim>(acc, rows, room.table(), gain, at);
      store_sums<kHeadDim>(room.table(), task, at, branch - 1);
    }
    row_gain(gain, p, at, branch - 1, scale_of(p.identity[branch - 1], at.spot.b));
    add_to(aside, acc, gain, at.lane);
  }
  if (stays) put_aside(aside, acc, at.lane);
  if (!stays) leave_chip<T, kHeadDim, kTwo>(acc, rows, task, at);
}

// 32 * warps threads. kTwo: ortho and ortho_v2.
template <class T, int kHeadDim, bool kTwo>
IDCORE_DEVICE void attend(const Task& task) {
  const Room<kHeadDim> room = {shared_memory(), shared_memory() + task.slot_offset, thread_count() / 32};
  const int begin = kTwo ? first_tile(task, block_x()) : block_x();
  const int end = kTwo ? first_tile(task, block_x() + 1) : begin + 1;
  Cursor next = start_of<kHeadDim>(task, begin, end);
  const Spot spot = next.spot;
  for (int ahead = 0; ahead + 1 < kStages; ++ahead) fetch<kHeadDim, kTwo>(task, next, room);
  int stage_in_use = 0;
  for (int tile = begin; tile < end; ++tile) {
    const Turn at = kTwo ? turn_of(spot_of(task, tile), (tile - begin) % task.slots) : turn_of(spot, 0);
    const bool stays = kTwo && task.together && tile >= end - task.slots;
    attend_tile<T, kHeadDim, kTwo>(task, room, next, stage_in_use, at, stays);
  }
  if (!kTwo || !task.together) return;
  sync_grid();
  finish_tiles<T, kHeadDim>(task, room, begin, end);
}

}  // namespace cuda
}  // namespace idcore
