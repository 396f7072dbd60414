// Products of blocks of rows with small matrices, for backward and the losses. After tile_values.h.
//
// Three shapes serve everything: `dots` (rows stand in lanes, [step][kRows], as in the forward's scores), and
// `mix`, which weighs rows of a matrix with [token][kRows] weights and sums over tokens or over rows.
#pragma once

#include "cpu/tile_values.h"

namespace idcore {
namespace cpu {
namespace {

// Words of `length` rows of `steps` elements packed for `dots`, with the slack that vector stores may run
// into.
IDC_INLINE int64_t packed_dots_words(int64_t length, int64_t steps) { return length * steps + kLanes; }

// Rows of elements to float32 groups of at most kMaxKeys rows, each [step][row].
template <Form F>
IDC_NOINLINE void pack_dots_form(const char* rows, int64_t row_bytes, int64_t length, int64_t steps,
                                 float* out) {
  const Groups groups(length, kMaxKeys);
  for (int64_t g = 0; g < groups.count; ++g) {
    const int64_t at = groups.offset(g), size = groups.size(g);
    transpose_rows<F>(rows + at * row_bytes, row_bytes, size, steps, out + at * steps, size);
  }
}

// Rows of elements to float32 rows of padded(head_dim), zeros behind them; rows from `valid` to `rows` are
// zeros.
template <Form F>
IDC_NOINLINE void load_rows_form(const char* base, int64_t row_bytes, int64_t valid, int64_t rows,
                                 int64_t head_dim, float* out) {
  const int64_t width = padded(head_dim);
  for (int64_t r = 0; r < rows; ++r, out += width) {
    for (int64_t d = 0; d < width; d += kLanes) {
      const bool there = r < valid;
      store(out + d, there ? load_form<F>(base + r * row_bytes, d, smaller(head_dim - d, kLanes)) : zero());
    }
  }
}

IDC_INLINE void pack_dots(DType type, const char* rows, int64_t row_bytes, int64_t length, int64_t steps,
                          float* out) {
  switch (type) {
    case DType::kFloat32:
      return pack_dots_form<Form::kFloat32>(rows, row_bytes, length, steps, out);
    case DType::kBFloat16:
      return pack_dots_form<Form::kBFloat16>(rows, row_bytes, length, steps, out);
    case DType::kFloat16:
      return pack_dots_form<Form::kFloat16>(rows, row_bytes, length, steps, out);
  }
}

IDC_INLINE void load_rows(DType type, const char* base, int64_t row_bytes, int64_t valid, int64_t rows,
                          int64_t head_dim, float* out) {
  switch (type) {
    case DType::kFloat32:
      return load_rows_form<Form::kFloat32>(base, row_bytes, valid, rows, head_dim, out);
    case DType::kBFloat16:
      return load_rows_form<Form::kBFloat16>(base, row_bytes, valid, rows, head_dim, out);
    case DType::kFloat16:
      return load_rows_form<Form::kFloat16>(base, row_bytes, valid, rows, head_dim, out);
  }
}

// kRows padded float32 rows to [step][kRows].
IDC_INLINE void lanes_of_rows(const float* rows, int64_t steps, float* out) {
  const int64_t width = padded(steps), bytes = width * 4;
  const char* base = reinterpret_cast<const char*>(rows);
  transpose_rows<Form::kFloat32>(base, bytes, kLanes, steps, out, kRows);
  transpose_rows<Form::kFloat32>(base + kLanes * bytes, bytes, kLanes, steps, out + kLanes, kRows);
}

// y[t][kRows] = sum over steps of x[step][kRows] * (packed row t)[step]; top: the largest of them per row.
IDC_NOINLINE void dots(const float* x, const float* packed, int64_t length, int64_t steps, float* y,
                       float* top) {
  store(top, all(-__builtin_inff()));
  store(top + kLanes, all(-__builtin_inff()));
  const Groups groups(length, kMaxKeys);
  for (int64_t g = 0; g < groups.count; ++g) {
    const int64_t at = groups.offset(g);
    score_group<Float32>(groups.size(g), x, packed + at * steps, steps, y + at * kRows, top);
  }
}

// Which index of the weights p[token][kRows] is summed over; the other one names the result's rows.
enum class Sum { kTokens, kRowsOfBlocks };

// `weights`: of `blocks` blocks of rows, `block_stride` floats apart. x: the matrix whose rows are weighed.
struct Mix {
  const float* weights;
  int64_t blocks, block_stride;
  const float* x;
  int64_t length;  // tokens
  int64_t width;   // padded channels: the distance of x's and y's rows
  float* y;        // [kRows or tokens][width]
  bool fresh;      // else added to what stands in y
};

template <Sum kSum, int R, int N>
IDC_NOINLINE void mix_tile(const Mix& m, int64_t first, int64_t vector) {
  V acc[R][N];
  float* y = m.y + first * m.width + vector * kLanes;
  clear(acc);
  const bool over_tokens = kSum == Sum::kTokens;
  const float* x = m.x + vector * kLanes;
  const int64_t steps = over_tokens ? m.length : kRows;
  for (int64_t b = 0; b < m.blocks; ++b) {
    const float* p = m.weights + b * m.block_stride + first * (over_tokens ? 1 : kRows);
    for (int64_t s = 0; s < steps; ++s, p += over_tokens ? kRows : 1, x += m.width) {
      V value[N];
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) value[j] = load(x + j * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const V w = all(p[r * (over_tokens ? 1 : kRows)]);
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) acc[r][j] = fma(w, value[j], acc[r][j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      float* to = y + r * m.width + j * kLanes;
      store(to, m.fresh ? acc[r][j] : add(acc[r][j], load(to)));
    }
  }
}

template <Sum kSum, int N, int R = kMaxRowsOf[N]>
IDC_INLINE void mix_rows(int64_t rows, const Mix& m, int64_t first, int64_t vector) {
  if (rows == R) return mix_tile<kSum, R, N>(m, first, vector);
  if constexpr (R > 1) mix_rows<kSum, N, R - 1>(rows, m, first, vector);
}

template <Sum kSum, int N = kMaxVectors>
IDC_INLINE void mix_vectors(int64_t vectors, const Mix& m, int64_t vector) {
  if (vectors == N) {
    const Groups groups(kSum == Sum::kTokens ? kRows : m.length, kMaxRowsOf[N]);
    for (int64_t g = 0; g < groups.count; ++g) mix_rows<kSum, N>(groups.size(g), m, groups.offset(g), vector);
    return;
  }
  if constexpr (N > 1) mix_vectors<kSum, N - 1>(vectors, m, vector);
}

// kTokens: y[row] (+)= sum over tokens of p[token][row] x[token], one block.
// kRowsOfBlocks: y[token] (+)= sum over the rows of all blocks of p[block][token][row] x[block * kRows +
// row].
template <Sum kSum>
IDC_NOINLINE void mix(const Mix& m) {
  const Groups groups(m.width / kLanes, kMaxVectors);
  for (int64_t g = 0; g < groups.count; ++g) mix_vectors<kSum>(groups.size(g), m, groups.offset(g));
}

}  // namespace
}  // namespace cpu
}  // namespace idcore
