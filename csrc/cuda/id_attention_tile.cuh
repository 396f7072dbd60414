// One warp's share of the attention: 16 image rows against blocks of keys that lie in shared memory.
#pragma once

#include "cuda/id_attention_plan.h"
#include "cuda/warp.cuh"
#include "id_attention.h"

namespace idcore {
namespace cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr int kWarpRows = 16;

template <int kHeadDim>
struct Geometry {
  static constexpr int kDepth = (kHeadDim + 15) / 16 * 16;  // head dim in whole 16-deep products, zero filled
  static constexpr int kSteps = kDepth / 16;
  static constexpr int kTiles = kHeadDim / 8;  // 8-wide column tiles of the result
  static constexpr int kPitch = kDepth + 8;    // elements between rows in shared memory: no bank conflicts
  static constexpr int kKeys = kStageKeys;
  static constexpr int kPairs = kKeys / 16;
  static constexpr int kStageElements = 2 * kKeys * kPitch;
  static constexpr int kRowElements = kWarpRows * kPitch;    // of a warp: q, then h, then the result
  static constexpr int kSpareFloats = kWarpRows * kHeadDim;  // of a warp: the running result

  static constexpr int kSlotBytes = 2 * kRowElements + 4 * kSpareFloats;
};

// How far a logit (base 2) may rise above the reference before the sums are rescaled: any reference gives the
// same quotient. At 8, weights stay below 256, well inside float16, and their power sqrt(D) inside float32.
constexpr float kHeadroom = 8.f;

// The softmax's sums while blocks of keys pass by; two rows a thread: lane / 4 and lane / 4 + 8.
struct RowState {
  float top[2];  // the reference, a base-2 logit at most kHeadroom below the largest
  float sum[2];
  float sum_unscaled[2];  // of the softmax of unscaled logits (ortho_v2)
  float first[2];         // what the first num_global tokens get of it
};

// Over the four lanes that hold one row.
IDCORE_DEVICE float row_max(float v) {
  v = fmaxf(v, exchange_xor(v, 1));
  return fmaxf(v, exchange_xor(v, 2));
}
IDCORE_DEVICE float row_sum(float v) {
  v += exchange_xor(v, 1);
  return v + exchange_xor(v, 2);
}

// exp2(difference * sqrt(D)) from p = exp2(difference).
template <int kHeadDim>
IDCORE_DEVICE float unscaled(float difference, float p, float root) {
  if (kHeadDim == 64) {
    const float p2 = p * p;
    const float p4 = p2 * p2;
    return p4 * p4;
  }
  return exp2_fast(difference * root);
}

// Where a thread copies: its row of the first pass, 8 elements from its column on, then every pass-th row.
struct Place {
  int row, column, pass;
};

template <int kHeadDim>
IDCORE_DEVICE Place place_of() {
  constexpr int kVectors = Geometry<kHeadDim>::kDepth / 8;
  const int pass = thread_count() / kVectors, row = thread_index() / kVectors;
  return {row < pass ? row : 1 << 20, thread_index() % kVectors * 8, pass};  // left over threads copy nothing
}

// 8 elements, or zeros.
IDCORE_DEVICE void copy_vector(uint16_t* to, const uint16_t* from, bool valid, bool aligned) {
  if (aligned) {
    copy16_async(to, from, valid);
    return;
  }
  IDCORE_NO_UNROLL
  for (int e = 0; e < 8; ++e) to[e] = valid ? from[e] : uint16_t(0);
}

// `rows` rows of D into shared memory, zeros past `count` and past D. `from`: at the thread's place.
template <int kHeadDim>
IDCORE_DEVICE void copy_rows(uint16_t* shared, const uint16_t* from, int64_t stride, int count, int rows,
                             const Place& at, bool aligned) {
  IDCORE_NO_UNROLL
  for (int row = at.row; row < rows; row += at.pass) {
    copy_vector(shared + row * Geometry<kHeadDim>::kPitch + at.column, from,
                row < count && at.column < kHeadDim, aligned);
    from += at.pass * stride;
  }
}

// Likewise a stage: kKeys rows of keys, then of values.
template <int kHeadDim>
IDCORE_DEVICE void copy_stage(uint16_t* stage, const uint16_t* k, const uint16_t* v, int64_t k_stride,
                              int64_t v_stride, int count, const Place& at, bool aligned) {
  using G = Geometry<kHeadDim>;
  for (int row = at.row;;) {
    if (row >= G::kKeys) return;
    const bool valid = row < count && at.column < kHeadDim;
    uint16_t* to = stage + row * G::kPitch + at.column;
    copy_vector(to, k, valid, aligned);
    copy_vector(to + G::kKeys * G::kPitch, v, valid, aligned);
    row += at.pass;
    if (row >= G::kKeys) return;  // one pass is the common case: no addresses for another
    k += at.pass * k_stride;
    v += at.pass * v_stride;
  }
}

// Fragments of this warp's 16 rows of q.
template <int kHeadDim>
IDCORE_DEVICE void load_query(uint32_t (&q)[Geometry<kHeadDim>::kSteps][4], const uint16_t* rows, int lane) {
  using G = Geometry<kHeadDim>;
  const uint16_t* at = rows + (lane & 15) * G::kPitch + (lane >> 4) * 8;
  IDCORE_UNROLL
  for (int step = 0; step < G::kSteps; ++step) load_matrices(q[step], at + step * 16);
}

// Products of 16 rows with kKeys keys, not yet divided by sqrt(D); -infinity past `count`. Whole pairs of
// column tiles past it are left out.
template <class T, int kHeadDim>
IDCORE_DEVICE void score(float (&s)[2 * Geometry<kHeadDim>::kPairs][4],
                         const uint32_t (&q)[Geometry<kHeadDim>::kSteps][4], const uint16_t* keys, int count,
                         int lane) {
  using G = Geometry<kHeadDim>;
  const uint16_t* at = keys + ((lane & 7) + (lane >> 4) * 8) * G::kPitch + (lane >> 3 & 1) * 8;
  IDCORE_UNROLL
  for (int pair = 0; pair < G::kPairs; ++pair) {
    IDCORE_UNROLL
    for (int e = 0; e < 4; ++e) s[2 * pair][e] = s[2 * pair + 1][e] = 0.f;
    if (pair * 16 >= count) continue;
    IDCORE_UNROLL
    for (int step = 0; step < G::kSteps; ++step) {
      uint32_t k[4];
      load_matrices(k, at + pair * 16 * G::kPitch + step * 16);
      T::multiply(s[2 * pair], q[step], k[0], k[1]);
      T::multiply(s[2 * pair + 1], q[step], k[2], k[3]);
    }
  }
  if (count >= G::kKeys) return;
  IDCORE_UNROLL
  for (int tile = 0; tile < 2 * G::kPairs; ++tile) {
    IDCORE_UNROLL
    for (int e = 0; e < 4; ++e)
      if (tile * 8 + (lane & 3) * 2 + (e & 1) >= count) s[tile][e] = -INFINITY;
  }
}

// Moves the reference of one row to `top` and scales what was summed under the old one; `keep`: but not acc.
template <int kHeadDim, bool kShare>
IDCORE_DEVICE void rescale(float (&acc)[Geometry<kHeadDim>::kTiles][4], RowState& state, int half, float top,
                           float root, bool keep) {
  const float difference = state.top[half] - top;  // -infinity where nothing was summed
  const float old = exp2_fast(difference);
  state.sum[half] *= old;
  if (kShare) {
    const float old_unscaled = unscaled<kHeadDim>(difference, old, root);
    state.sum_unscaled[half] *= old_unscaled;
    state.first[half] *= old_unscaled;
  }
  state.top[half] = top;
  if (keep) return;
  IDCORE_UNROLL
  for (int tile = 0; tile < Geometry<kHeadDim>::kTiles; ++tile) {
    acc[tile][2 * half] *= old;
    acc[tile][2 * half + 1] *= old;
  }
}

// Turns products into weights exp2(factor * product - top) and keeps the sums.
template <int kHeadDim, bool kShare>
IDCORE_DEVICE void weigh(float (&s)[2 * Geometry<kHeadDim>::kPairs][4],
                         float (&acc)[Geometry<kHeadDim>::kTiles][4], RowState& state, float factor,
                         int first_tokens, float root, int lane, bool keep) {
  using G = Geometry<kHeadDim>;
  IDCORE_UNROLL
  for (int half = 0; half < 2; ++half) {
    float largest = -INFINITY;
    IDCORE_UNROLL
    for (int tile = 0; tile < 2 * G::kPairs; ++tile)
      largest = fmaxf(largest, fmaxf(s[tile][2 * half], s[tile][2 * half + 1]));
    const float top = row_max(largest) * factor;
    if (top > state.top[half] + kHeadroom) rescale<kHeadDim, kShare>(acc, state, half, top, root, keep);
    const float base = state.top[half] == -INFINITY ? 0.f : state.top[half];  // all keys are masked out
    float sum = 0.f, sum_unscaled = 0.f, got = 0.f;
    IDCORE_UNROLL
    for (int tile = 0; tile < 2 * G::kPairs; ++tile) {
      IDCORE_UNROLL
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        const float difference = fmaf(s[tile][e], factor, -base);
        const float p = exp2_fast(difference);
        s[tile][e] = p;
        sum += p;
        if (kShare) {
          const float u = unscaled<kHeadDim>(difference, p, root);
          sum_unscaled += u;
          if (tile * 8 + (lane & 3) * 2 + (e & 1) < first_tokens) got += u;
        }
      }
    }
    state.sum[half] += sum;
    if (kShare) state.sum_unscaled[half] += sum_unscaled;
    if (kShare) state.first[half] += got;
  }
}

// Weights of a row to `gain` in sum.
template <int kHeadDim>
IDCORE_DEVICE void weigh_to(float (&s)[2 * Geometry<kHeadDim>::kPairs][4], const RowState& state,
                            const float (&gain)[2]) {
  IDCORE_UNROLL
  for (int half = 0; half < 2; ++half) {
    const float by = gain[half] / row_sum(state.sum[half]);
    IDCORE_UNROLL
    for (int tile = 0; tile < 2 * Geometry<kHeadDim>::kPairs; ++tile) {
      s[tile][2 * half] *= by;
      s[tile][2 * half + 1] *= by;
    }
  }
}

// acc += weights times values.
template <class T, int kHeadDim>
IDCORE_DEVICE void apply(float (&acc)[Geometry<kHeadDim>::kTiles][4],
                         const float (&s)[2 * Geometry<kHeadDim>::kPairs][4], const uint16_t* values,
                         int count, int lane) {
  using G = Geometry<kHeadDim>;
  const uint16_t* at = values + (lane & 15) * G::kPitch + (lane >> 4) * 8;
  IDCORE_UNROLL
  for (int pair = 0; pair < G::kPairs; ++pair) {
    if (pair * 16 >= count) continue;
    const float (&left)[4] = s[2 * pair];
    const float (&right)[4] = s[2 * pair + 1];
    const uint32_t p[4] = {T::pack(left[0], left[1]), T::pack(left[2], left[3]), T::pack(right[0], right[1]),
                           T::pack(right[2], right[3])};
    IDCORE_UNROLL
    for (int tile = 0; tile < G::kTiles; tile += 2) {
      uint32_t v[4];
      load_matrices_transposed(v, at + pair * 16 * G::kPitch + tile * 8);
      T::multiply(acc[tile], p, v[0], v[1]);
      if (tile + 1 < G::kTiles) T::multiply(acc[tile + 1 < G::kTiles ? tile + 1 : tile], p, v[2], v[3]);
    }
  }
}

// Fragments to 16 rows in shared memory, cast to T.
template <class T, int kHeadDim>
IDCORE_DEVICE void stage(uint16_t* rows, const float (&x)[Geometry<kHeadDim>::kTiles][4], int lane) {
  using G = Geometry<kHeadDim>;
  uint16_t* at = rows + (lane >> 2) * G::kPitch + (lane & 3) * 2;
  IDCORE_UNROLL
  for (int tile = 0; tile < G::kTiles; ++tile) {
    *reinterpret_cast<uint32_t*>(at + tile * 8) = T::pack(x[tile][0], x[tile][1]);
    *reinterpret_cast<uint32_t*>(at + 8 * G::kPitch + tile * 8) = T::pack(x[tile][2], x[tile][3]);
  }
}

struct alignas(16) Vector16 {
  uint32_t word[4];
};
struct alignas(16) Float4 {
  float x[4];
};

// Eight elements of memory whose address may or may not be a multiple of 16.
IDCORE_DEVICE Vector16 load_vector(const uint16_t* from, bool aligned) {
  if (aligned) return *reinterpret_cast<const Vector16*>(from);
  Vector16 x;
  IDCORE_UNROLL
  for (int e = 0; e < 4; ++e) x.word[e] = from[2 * e] | static_cast<uint32_t>(from[2 * e + 1]) << 16;
  return x;
}
IDCORE_DEVICE void store_vector(uint16_t* to, const Vector16& x, bool aligned) {
  if (aligned) {
    *reinterpret_cast<Vector16*>(to) = x;
    return;
  }
  IDCORE_UNROLL
  for (int e = 0; e < 8; ++e) to[e] = static_cast<uint16_t>(x.word[e / 2] >> (e % 2 * 16));
}

// The warp's staged rows to memory, 16 bytes a lane where addresses allow.
template <int kHeadDim>
IDCORE_DEVICE void write_rows(uint16_t* matrix, int64_t stride, const uint16_t* rows, int first, int count,
                              bool aligned, int lane) {
  constexpr int kVectors = kHeadDim / 8, kPass = 32 / kVectors;
  const int row = lane / kVectors, column = lane % kVectors * 8;
  if (row >= kPass) return;
  const uint16_t* from = rows + row * Geometry<kHeadDim>::kPitch + column;
  uint16_t* to = matrix + (first + row) * stride + column;
  const int end = count - first < kWarpRows ? count - first : kWarpRows;
  for (int r = row; r < end; r += kPass) {
    store_vector(to, *reinterpret_cast<const Vector16*>(from), aligned);
    from += kPass * Geometry<kHeadDim>::kPitch;
    to += kPass * stride;
  }
}

}  // namespace cuda
}  // namespace idcore
