// Probabilities times values for a block of rows, and the merge of text and identities. Channels stand in
// lanes.
#pragma once

#include "cpu/tile_scores.h"

namespace idcore {
namespace cpu {
namespace {

// One block of rows of one head. Probabilities are not divided by their sums yet, except as noted.
struct Block {
  int64_t rows;  // valid ones, at most kRows
  int64_t head_dim;
  DType dtype;
  int branches;
  const float* scores[kMaxBranches];  // [step][kRows]
  const float* values[kMaxBranches];  // packed
  int64_t steps[kMaxBranches];
  char* out;
  int64_t out_row_bytes;
  float norm[kMaxBranches][kRows];  // 1 / sum of the branch's probabilities
  // Only for ortho and ortho_v2:
  DType wait_dtype;  // of h and u between the passes
  char* text;        // rows of `plan.text`
  char* mixed;       // rows of `plan.mixed`; null: u goes to `out`
  int64_t text_row_bytes;
  float weight[kMaxIdentities][kRows];  // w, the region mask
  float amount[kMaxIdentities][kRows];  // s w
  float* sums;                          // [n, 2, padded head dim]
};

// Where a tile stands in the block: rows from `row`, channels from vector `vector`, `channels` of them valid.
struct Place {
  int64_t row, vector, channels;
};

template <class Dot, int R, int N>
IDC_INLINE void accumulate(V (&acc)[R][N], const Block& block, const Place& at, int branch) {
  if constexpr (Dot::kInTiles) {
    Dot::accumulate(acc, block, at, branch);
  } else {
    const int64_t steps = block.steps[branch];
    const float* p = block.scores[branch] + at.row;
    const float* v = block.values[branch] + at.vector * kLanes * steps;
    for (int64_t s = 0; s < steps; ++s, p += kRows, v += N * kLanes) {
      V value[N];
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) value[j] = load(v + j * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const V x = all(p[r]);
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) acc[r][j] = Dot::multiply_add(x, value[j], acc[r][j]);
      }
    }
  }
}

template <int R, int N>
IDC_INLINE void clear(V (&acc)[R][N]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) acc[r][j] = zero();
  }
}

template <int R, int N>
IDC_INLINE void scale_rows(V (&acc)[R][N], const float* factor) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const V f = all(factor[r]);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) acc[r][j] = mul(f, acc[r][j]);
  }
}

IDC_INLINE void store_typed(DType dtype, char* row, int64_t d, V a, int64_t n) {
  switch (dtype) {
    case DType::kFloat32:
      return store_fp32(reinterpret_cast<float*>(row) + d, a, n);
    case DType::kBFloat16:
      return store_bf16(reinterpret_cast<uint16_t*>(row) + d, a, n);
    case DType::kFloat16:
      return store_fp16(reinterpret_cast<uint16_t*>(row) + d, a, n);
  }
}

// `rows` x `channels` floats to rows of another type.
IDC_NOINLINE void store_rows(const float* part, int64_t rows, int64_t ld, DType dtype, char* out,
                             int64_t row_bytes, int64_t d, int64_t channels) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < channels; c += kLanes) {
      store_typed(dtype, out + r * row_bytes, d + c, load(part + r * ld + c), smaller(channels - c, kLanes));
    }
  }
}

template <int R, int N>
IDC_INLINE void store_tile(V (&acc)[R][N], DType dtype, char* block_start, int64_t row_bytes,
                           const Place& at) {
  char* out = block_start + at.row * row_bytes;
  const int64_t d = at.vector * kLanes;
  if (dtype == DType::kFloat32 && at.channels == N * kLanes) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j)
        store(reinterpret_cast<float*>(out + r * row_bytes) + d + j * kLanes, acc[r][j]);
    }
    return;
  }
  float part[R * N * kLanes];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) store(part + (r * N + j) * kLanes, acc[r][j]);
  }
  store_rows(part, R, N * kLanes, dtype, out, row_bytes, d, at.channels);
}

// merge "add": the identities' probabilities already hold s w / (sum of theirs) * (sum of the text's).
struct AddMerge {
  template <class Dot, int R, int N>
  static IDC_NOINLINE void tile(const Block& block, const Place& at) {
    V acc[R][N];
    clear(acc);
    for (int b = 0; b < block.branches; ++b) accumulate<Dot>(acc, block, at, b);
    scale_rows(acc, block.norm[0] + at.row);
    store_tile(acc, block.dtype, block.out, block.out_row_bytes, at);
  }
};

// Rows of floats.
struct Rows {
  float* start;
  int64_t stride;
  IDC_INLINE float* at(int r) const { return start + r * stride; }
};

IDC_INLINE Rows rows_of(char* block_start, int64_t row_bytes, const Place& at) {
  const int64_t stride = row_bytes / static_cast<int64_t>(sizeof(float));
  return Rows{reinterpret_cast<float*>(block_start) + at.row * stride + at.vector * kLanes, stride};
}

// First pass of ortho and ortho_v2: keeps the text attention h, stores h + sum s w i, sums w h i and w h h
// over rows.
struct OrthoMerge {
  // i = acc * norm; to = before + amount * i; hi += w h i, hh += w h h.
  template <int R, int N>
  static IDC_INLINE void merge(V (&acc)[R][N], const Block& block, const Place& at, int b, const Rows& h,
                               const Rows& before, const Rows& to) {
    const float *norm = block.norm[b] + at.row, *weight = block.weight[b - 1] + at.row,
                *amount = block.amount[b - 1] + at.row;
    float* hi = block.sums + (b - 1) * 2 * padded(block.head_dim) + at.vector * kLanes;
    float* hh = hi + padded(block.head_dim);
    V sum_hi[N], sum_hh[N];  // of this tile alone: the error of long sums in sequence grows with their length
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) sum_hi[j] = sum_hh[j] = zero();
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const V f = all(norm[r]), w = all(weight[r]), s = all(amount[r]);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        const V x = load(h.at(r) + j * kLanes), wx = mul(w, x), i = mul(f, acc[r][j]);
        sum_hi[j] = fma(wx, i, sum_hi[j]);
        sum_hh[j] = fma(wx, x, sum_hh[j]);
        store(to.at(r) + j * kLanes, fma(s, i, load(before.at(r) + j * kLanes)));
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      store(hi + j * kLanes, add(sum_hi[j], load(hi + j * kLanes)));
      store(hh + j * kLanes, add(sum_hh[j], load(hh + j * kLanes)));
    }
  }

  // h = acc * norm
  template <int R, int N>
  static IDC_INLINE void keep(const V (&acc)[R][N], const float* norm, const Rows& h) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const V f = all(norm[r]);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) store(h.at(r) + j * kLanes, mul(f, acc[r][j]));
    }
  }

  template <class Dot, int R, int N>
  static IDC_NOINLINE void tile(const Block& block, const Place& at) {
    alignas(64) float h_part[R * N * kLanes], u_part[R * N * kLanes];
    const bool floats_wait = block.wait_dtype == DType::kFloat32;
    const Rows h = floats_wait ? rows_of(block.text, block.text_row_bytes, at) : Rows{h_part, N * kLanes};
    const Rows u{u_part, N * kLanes};
    V acc[R][N];
    clear(acc);
    accumulate<Dot>(acc, block, at, 0);
    keep(acc, block.norm[0] + at.row, h);
    if (!floats_wait) {
      store_rows(h_part, R, N * kLanes, block.wait_dtype, block.text + at.row * block.text_row_bytes,
                 block.text_row_bytes, at.vector * kLanes, N * kLanes);
    }
    const bool whole = block.dtype == DType::kFloat32 && at.channels == N * kLanes;
    const Rows to = block.mixed != nullptr ? rows_of(block.mixed, block.text_row_bytes, at)
                    : whole                ? rows_of(block.out, block.out_row_bytes, at)
                                           : u;
    for (int b = 1; b < block.branches; ++b) {
      clear(acc);
      accumulate<Dot>(acc, block, at, b);
      merge(acc, block, at, b, h, b == 1 ? h : u, b + 1 < block.branches ? u : to);
    }
    if (to.start == u_part) {
      store_rows(u_part, R, N * kLanes, block.dtype, block.out + at.row * block.out_row_bytes,
                 block.out_row_bytes, at.vector * kLanes, at.channels);
    }
  }
};

template <class Rule, class Dot, int N, int R = kMaxRowsOf[N]>
IDC_INLINE void pick_rows(int64_t rows, const Block& block, const Place& at) {
  if (rows == R) return Rule::template tile<Dot, R, N>(block, at);
  if constexpr (R > 1) pick_rows<Rule, Dot, N, R - 1>(rows, block, at);
}

template <class Rule, class Dot, int N = kMaxVectors>
IDC_INLINE void values_of_group(int64_t vectors, const Block& block, Place at) {
  if (vectors == N) {
    const Groups groups(block.rows, kMaxRowsOf[N]);
    for (int64_t g = 0; g < groups.count; ++g) {
      at.row = groups.offset(g);
      pick_rows<Rule, Dot, N>(groups.size(g), block, at);
    }
    return;
  }
  if constexpr (N > 1) values_of_group<Rule, Dot, N - 1>(vectors, block, at);
}

template <class Rule, class Dot>
void values(const Block& block) {
  if constexpr (Dot::kInTiles) {
    for (int64_t d = 0; d < block.head_dim; d += kLanes) {
      for (int64_t row = 0; row < block.rows; row += kLanes)
        pick_rows<Rule, Dot, 1, kLanes>(smaller(block.rows - row, kLanes), block,
                                        Place{row, d / kLanes, kLanes});
    }
  } else {
    const Groups groups(ceil_div(block.head_dim, kLanes), kMaxVectors);
    for (int64_t g = 0; g < groups.count; ++g) {
      const int64_t first_channel = groups.offset(g) * kLanes;
      const int64_t channels = smaller(block.head_dim - first_channel, groups.size(g) * kLanes);
      values_of_group<Rule, Dot>(groups.size(g), block, Place{0, groups.offset(g), channels});
    }
  }
}

}  // namespace
}  // namespace cpu
}  // namespace idcore
