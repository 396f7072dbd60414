// First kernel of `id_attention`. attend_kernel: one block for some rows of one head; it walks through the
// text's keys, then each identity's, as one stream of tiles that are copied ahead of their use. "add" is
// finished by it. For ortho and ortho_v2 it stores X = h + sum_j s_j w_j i_j in the output, h and the sums
// over its rows of w h i and w h h; merge_kernel adds those sums in a fixed order (the result is the same in
// every run) and applies the ratio alpha and the share a.
#pragma once

#include "cuda/id_attention_task.cuh"
#include "cuda/id_attention_tile.cuh"

namespace idcore {
namespace cuda {

// The stream of key tiles: branch 0 is the text, branch j + 1 identity j.
struct Cursor {
  int branch;
  int first;
};

IDCORE_DEVICE int branch_length(const IdAttentionParams& p, int branch) {
  return static_cast<int>(branch == 0 ? p.lt : p.identity[branch - 1].length);
}

IDCORE_DEVICE void advance(const IdAttentionParams& p, Cursor& c, int keys) {
  c.first += keys;
  while (c.branch <= p.num_identities && c.first >= branch_length(p, c.branch)) {
    ++c.branch;
    c.first = 0;
  }
}

template <int kHeadDim>
IDCORE_DEVICE void fetch(const Task& task, const Cursor& c, uint16_t* stage, int64_t b, int64_t head) {
  using G = Geometry<kHeadDim>;
  const IdAttentionParams& p = task.p;
  if (c.branch <= p.num_identities) {
    const HeadTensor& k = c.branch == 0 ? p.k_text : p.identity[c.branch - 1].k;
    const HeadTensor& v = c.branch == 0 ? p.v_text : p.identity[c.branch - 1].v;
    const int count = branch_length(p, c.branch);
    load_rows<kHeadDim>(stage, head_of(k, p.batch, b, head), k.stride_row, c.first, count, G::kKeys,
                        task.aligned);
    load_rows<kHeadDim>(stage + G::kKeys * G::kPitch, head_of(v, p.batch, b, head), v.stride_row, c.first,
                        count, G::kKeys, task.aligned);
  }
  commit_copies();
}

template <class T, int kHeadDim>
IDCORE_DEVICE void add_bias(float (&s)[2 * Geometry<kHeadDim>::kPairs][4], const IdAttentionParams& p,
                            int64_t b, int64_t head, int row, int first, int count, int lane) {
  const TextBias& bias = p.text_bias;
  const int64_t base = b * bias.stride_batch + head * bias.stride_head;
  IDCORE_UNROLL
  for (int tile = 0; tile < 2 * Geometry<kHeadDim>::kPairs; ++tile) {
    IDCORE_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int key = tile * 8 + (lane & 3) * 2 + (e & 1);
      const int64_t r = row + (lane >> 2) + (e >> 1) * 8;
      if (key >= count || r >= p.lq) continue;
      const int64_t at = base + r * bias.stride_row + (first + key) * bias.stride_token;
      const float value = bias.dtype == DType::kFloat32 ? static_cast<const float*>(bias.data)[at]
                                                        : T::one(static_cast<const uint16_t*>(bias.data)[at]);
      s[tile][e] += value * kLog2E;
    }
  }
}

// Softmax state before any key: the zero tokens, whose logit is 0.
IDCORE_DEVICE void start_branch(RowState& state, int branch, const IdAttentionParams& p) {
  const int zeros = branch == 0 ? 0 : p.num_zero;
  const int beyond = branch == 0 ? 0 : p.num_global - branch_length(p, branch);
  const int counted = beyond < 0 ? 0 : beyond < zeros ? beyond : zeros;
  IDCORE_UNROLL
  for (int half = 0; half < 2; ++half) {
    state.top[half] = zeros > 0 ? 0.f : -INFINITY;
    // The four lanes of a row add up their sums in the end, so one of them starts with the zero tokens.
    state.sum[half] = (thread_index() & 3) == 0 ? static_cast<float>(zeros) : 0.f;
    state.sum_unscaled[half] = state.sum[half];
    state.first[half] = (thread_index() & 3) == 0 ? static_cast<float>(counted) : 0.f;
  }
}

// Divides by the softmax's sum and stores each row's share.
template <int kHeadDim, bool kTwo>
IDCORE_DEVICE void finish_branch(float (&acc)[Geometry<kHeadDim>::kTiles][4], const RowState& state,
                                 const Task& task, int branch, int64_t b, int64_t head, int row, int lane) {
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
      const int64_t r = row + (lane >> 2) + half * 8;
      if ((lane & 3) == 0 && r < p.lq)
        task.share[(((branch - 1) * p.batch + b) * p.heads + head) * p.lq + r] = got;
    }
  }
}

// Sums over the block's rows of w h i and w h h: first over a warp's rows, then over its warps.
template <class T, int kHeadDim>
IDCORE_DEVICE void store_sums(const float (&i)[Geometry<kHeadDim>::kTiles][4], const uint16_t* h_rows,
                              float* table, const float (&w)[2], const Task& task, int j, int64_t b,
                              int64_t head, int warp, int lane) {
  using G = Geometry<kHeadDim>;
  const uint16_t* at = h_rows + (lane >> 2) * G::kPitch + (lane & 3) * 2;
  IDCORE_UNROLL
  for (int tile = 0; tile < G::kTiles; ++tile) {
    float num[2] = {0.f, 0.f}, den[2] = {0.f, 0.f};
    IDCORE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const uint32_t word = *reinterpret_cast<const uint32_t*>(at + half * 8 * G::kPitch + tile * 8);
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
      if (lane < 4) {
        const int channel = tile * 8 + lane * 2 + e;
        table[(warp * 2 + 0) * kHeadDim + channel] = num[e];
        table[(warp * 2 + 1) * kHeadDim + channel] = den[e];
      }
    }
  }
  sync_block();
  const IdAttentionParams& p = task.p;
  const int warps = thread_count() / 32;
  for (int c = thread_index(); c < 2 * kHeadDim; c += thread_count()) {
    float total = 0.f;
    for (int from = 0; from < warps; ++from) total += table[from * 2 * kHeadDim + c];
    const int64_t which = (static_cast<int64_t>(block_x()) * p.num_identities + j) * 2 + c / kHeadDim;
    task.sums[(which * p.batch * p.heads + b * p.heads + head) * kHeadDim + c % kHeadDim] = total;
  }
  sync_block();
}

// The running result X waits in shared memory, in slots of its own for each lane: in registers, two blocks
// would not fit on a multiprocessor.
template <int kTiles>
IDCORE_DEVICE void put_aside(float* slots, const float (&x)[kTiles][4], int lane) {
  IDCORE_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) {
    IDCORE_UNROLL
    for (int e = 0; e < 4; ++e) slots[(tile * 4 + e) * 32 + lane] = x[tile][e];
  }
}

// x becomes X + s w x.
template <int kTiles>
IDCORE_DEVICE void add_to(const float* slots, float (&x)[kTiles][4], float scale, const float (&w)[2],
                          int lane) {
  IDCORE_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) {
    IDCORE_UNROLL
    for (int e = 0; e < 4; ++e)
      x[tile][e] = slots[(tile * 4 + e) * 32 + lane] + scale * w[e / 2] * x[tile][e];
  }
}

// Grid (blocks of rows, H, B); 32 * warps threads, 16 rows a warp. kTwo: ortho and ortho_v2.
template <class T, int kHeadDim, bool kTwo>
IDCORE_DEVICE void attend_rows(const Task& task) {
  using G = Geometry<kHeadDim>;
  const IdAttentionParams& p = task.p;
  const int warp = thread_index() / 32, lane = thread_index() % 32, warps = thread_count() / 32;
  const int64_t head = block_y(), b = block_z();
  const int first_row = block_x() * warps * kWarpRows, row = first_row + warp * kWarpRows;
  uint16_t* const stages = reinterpret_cast<uint16_t*>(shared_memory());
  uint16_t* const all_rows = stages + 2 * G::kStageElements;
  uint16_t* const rows = all_rows + warp * G::kRowElements;
  float* const table = reinterpret_cast<float*>(all_rows + warps * G::kRowElements);
  float* const aside = table + warps * 2 * kHeadDim + warp * G::kSpareFloats;

  load_rows<kHeadDim>(all_rows, head_of(p.q, p.batch, b, head), p.q.stride_row, first_row,
                      static_cast<int>(p.lq), warps * kWarpRows, task.aligned);
  Cursor next = {0, 0};
  fetch<kHeadDim>(task, next, stages, b, head);
  advance(p, next, G::kKeys);
  const float root = sqrtf(static_cast<float>(kHeadDim));
  uint32_t q[G::kSteps][4];
  float acc[G::kTiles][4];
  int step = 0;
  for (int branch = 0; branch <= p.num_identities; ++branch) {
    RowState state;
    start_branch(state, branch, p);
    IDCORE_UNROLL
    for (int tile = 0; tile < G::kTiles; ++tile) {
      IDCORE_UNROLL
      for (int e = 0; e < 4; ++e) acc[tile][e] = 0.f;
    }
    const int length = branch_length(p, branch);
    for (int first = 0; first < length; first += G::kKeys, ++step) {
      fetch<kHeadDim>(task, next, stages + (step + 1) % 2 * G::kStageElements, b, head);
      advance(p, next, G::kKeys);
      wait_copies<1>();
      sync_block();
      if (step == 0) load_query<kHeadDim>(q, rows, lane);
      const uint16_t* k = stages + step % 2 * G::kStageElements;
      const int count = length - first;
      float s[2 * G::kPairs][4];
      score<T, kHeadDim>(s, q, k, count, kLog2E / root, lane);
      if (branch == 0 && p.text_bias.data) add_bias<T, kHeadDim>(s, p, b, head, row, first, count, lane);
      if (kTwo && branch > 0 && p.merge == Merge::kOrthoV2) {
        weigh<kHeadDim, true>(s, acc, state, p.num_global - first, root, lane);
      } else {
        weigh<kHeadDim, false>(s, acc, state, 0, root, lane);
      }
      apply<T, kHeadDim>(acc, s, k + G::kKeys * G::kPitch, count, lane);
      sync_block();
    }
    finish_branch<kHeadDim, kTwo>(acc, state, task, branch, b, head, row, lane);
    if (branch == 0) {
      if (kTwo) {
        stage<T, kHeadDim>(rows, acc, lane);
        sync_warp();
        uint16_t* h = task.text + (b * p.heads + head) * p.lq * kHeadDim;
        write_rows<kHeadDim>(h, kHeadDim, rows, row, static_cast<int>(p.lq), true, lane);
      }
    } else {
      const Identity& id = p.identity[branch - 1];
      const float w[2] = {mask_at(id, b, row + (lane >> 2), p.lq),
                          mask_at(id, b, row + (lane >> 2) + 8, p.lq)};
      if (kTwo) store_sums<T, kHeadDim>(acc, rows, table, w, task, branch - 1, b, head, warp, lane);
      add_to(aside, acc, scale_of(id, b), w, lane);
    }
    if (branch < p.num_identities) put_aside(aside, acc, lane);
  }
  sync_warp();
  stage<T, kHeadDim>(rows, acc, lane);
  sync_warp();
  uint16_t* out = const_cast<uint16_t*>(head_of(p.out, p.batch, b, head));
  write_rows<kHeadDim>(out, p.out.stride_row, rows, row, static_cast<int>(p.lq), task.aligned, lane);
}

}  // namespace cuda
}  // namespace idcore
