// Products of blocks of rows with small matrices, for backward and the losses. After tile_values.h.
//
// Three shapes serve everything: `dots` (rows stand in lanes, [step][kRows], as in the forward's scores), and
// `mix`, which weighs rows of a matrix with [token][kRows] weights and sums over tokens or over rows. With
// pairs the words of both operands hold two neighbours of the index that is summed over.
#pragma once

#include "cpu/tile_values.h"
#if defined(IDC_PAIRS)
#include "cpu/tile_pairs.h"
#endif

namespace idcore {
namespace cpu {
namespace {

// Words of `length` rows of `steps` words packed for `dots`, with the slack that vector stores may run into.
IDC_INLINE int64_t packed_dots_words(int64_t length, int64_t steps) { return length * steps + kLanes; }

// Rows to groups of at most kMaxKeys rows, each [step][row].
IDC_NOINLINE void pack_dots(Form form, const char* rows, int64_t row_bytes, int64_t length, int64_t steps,
                            float* out) {
  const Groups groups(length, kMaxKeys);
  for (int64_t g = 0; g < groups.count; ++g) {
    const int64_t at = groups.offset(g), size = groups.size(g);
    transpose_rows(form, rows + at * row_bytes, row_bytes, size, steps, out + at * steps, size);
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

struct Nothing {
  IDC_INLINE void step() {}
};

// y[t][kRows] = sum over steps of x[step][kRows] * (packed row t)[step]; top: the largest of them per row.
template <class Dot>
IDC_NOINLINE void dots(const float* x, const float* packed, int64_t length, int64_t head_dim, float* y,
                       float* top) {
  Nothing ahead;
  score_branch<Dot>(x, packed, length, head_dim / Dot::kPerStep, ahead, y, top);
}

// Which index of the weights p[token][kRows] is summed over; the other one names the result's rows.
enum class Sum { kTokens, kRowsOfBlocks };

// `weights`: of `blocks` blocks of rows, `block_stride` floats apart, each [token][kRows] or with pairs
// [token / 2][kRows] or [token][kRows / 2]. x: the matrix whose rows are weighed, or [row / 2] pairs of them.
struct Mix {
  const float* weights;
  int64_t blocks, block_stride;
  const float* x;
  int64_t length;  // tokens
  int64_t width;   // padded channels: the distance of x's and y's rows
  float* y;        // [kRows or tokens][width]
  bool fresh;      // else added to what stands in y
};

template <class Dot, Sum kSum, int R, int N>
IDC_NOINLINE void mix_tile(const Mix& m, int64_t first, int64_t vector) {
  V acc[R][N];
  float* y = m.y + first * m.width + vector * kLanes;
  clear(acc);
  constexpr bool over_tokens = kSum == Sum::kTokens;
  constexpr int64_t token_words = kRows / Dot::kPerStep;
  const float* x = m.x + vector * kLanes;
  const int64_t steps = over_tokens ? ceil_div(m.length, Dot::kPerStep) : token_words;
  for (int64_t b = 0; b < m.blocks; ++b) {
    const float* p = m.weights + b * m.block_stride + first * (over_tokens ? 1 : token_words);
    for (int64_t s = 0; s < steps; ++s, p += over_tokens ? kRows : 1, x += m.width) {
      V value[N];
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) value[j] = load(x + j * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const V w = all(p[r * (over_tokens ? 1 : token_words)]);
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) acc[r][j] = Dot::multiply_add(w, value[j], acc[r][j]);
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

template <class Dot, Sum kSum, int N, int R = kMaxRowsOf[N]>
IDC_INLINE void mix_rows(int64_t rows, const Mix& m, int64_t first, int64_t vector) {
  if (rows == R) return mix_tile<Dot, kSum, R, N>(m, first, vector);
  if constexpr (R > 1) mix_rows<Dot, kSum, N, R - 1>(rows, m, first, vector);
}

template <class Dot, Sum kSum, int N = kMaxVectors>
IDC_INLINE void mix_vectors(int64_t vectors, const Mix& m, int64_t vector) {
  if (vectors == N) {
    const Groups groups(kSum == Sum::kTokens ? kRows : m.length, kMaxRowsOf[N]);
    for (int64_t g = 0; g < groups.count; ++g)
      mix_rows<Dot, kSum, N>(groups.size(g), m, groups.offset(g), vector);
    return;
  }
  if constexpr (N > 1) mix_vectors<Dot, kSum, N - 1>(vectors, m, vector);
}

// kTokens: y[row] (+)= sum over tokens of p[token][row] x[token], one block.
// kRowsOfBlocks: y[token] (+)= sum over the rows of all blocks of p[block][token][row] x[block * kRows +
// row].
template <class Dot, Sum kSum>
IDC_NOINLINE void mix(const Mix& m) {
  const Groups groups(m.width / kLanes, kMaxVectors);
  for (int64_t g = 0; g < groups.count; ++g) mix_vectors<Dot, kSum>(groups.size(g), m, groups.offset(g));
}

// Rows as operands of both kinds. lanes: for `dots`, [block][step][kRows], blocks kRows * width apart; out:
// to be weighed, [rows][width], or [rows / 2][width] pairs. Rows from `valid` on are zeros.
template <class Dot>
IDC_INLINE void load_operand(DType type, const char* base, int64_t row_bytes, int64_t valid, int64_t blocks,
                             int64_t head_dim, float* lanes, float* out) {
  const int64_t block = kRows * padded(head_dim);
#if defined(IDC_PAIRS)
  if constexpr (Dot::kPerStep == 2) {
    load_row_pairs(base, row_bytes, valid, blocks * kRows, head_dim, out);
    for (int64_t r = 0; r < blocks * kRows; r += kLanes) {
      transpose_rows<Form::kWords>(base + r * row_bytes, row_bytes, valid - r, head_dim / 2,
                                   lanes + r / kRows * block + r % kRows, kRows);
    }
    return;
  }
#endif
  load_rows(type, base, row_bytes, valid, blocks * kRows, head_dim, out);
  for (int64_t m = 0; m < blocks; ++m) lanes_of_rows(out + m * block, head_dim, lanes + m * block);
}

// Block `block` of a panel's float32 rows as operand of both kinds. Pairs take the rows' place, block behind
// block, so blocks must come in their order. half: scratch for kRows * width elements of 16 bit.
template <class Dot>
IDC_INLINE void as_operand(float* rows, int64_t block, int64_t head_dim, float* lanes, float* half) {
  const int64_t width = padded(head_dim);
  float* own = rows + block * kRows * width;
#if defined(IDC_PAIRS)
  if constexpr (Dot::kPerStep == 2) {
    char* narrow = reinterpret_cast<char*>(half);
    store_rows(own, kRows, width, DType::kBFloat16, narrow, width * 2, 0, width);
    load_operand<Dot>(DType::kBFloat16, narrow, width * 2, kRows, 1, head_dim, lanes,
                      rows + block * kRows / 2 * width);
    return;
  }
#endif
  (void)half;
  lanes_of_rows(own, head_dim, lanes);
}

// out[row] (+)= sum over tokens of p[token][row] x[token], one block. words: scratch for as much as p.
template <class Dot>
IDC_INLINE void weigh_tokens(const float* p, const float* x, int64_t length, int64_t width, float* words,
                             float* out, bool fresh) {
#if defined(IDC_PAIRS)
  if constexpr (Dot::kPerStep == 2) {
    to_pairs(p, length, words);
    p = words;
  }
#endif
  (void)words;
  mix<Dot, Sum::kTokens>({p, 1, 0, x, length, width, out, fresh});
}

// out[token] (+)= sum over rows of p[block][token][row] x[block * kRows + row]. p is used up.
template <class Dot>
IDC_INLINE void weigh_rows(float* p, int64_t blocks, const float* x, int64_t length, int64_t width,
                           float* out, bool fresh) {
  const int64_t stride = length * kRows;
#if defined(IDC_PAIRS)
  if constexpr (Dot::kPerStep == 2) {
    for (int64_t m = 0; m < blocks; ++m) to_row_pairs(p + m * stride, length);
  }
#endif
  mix<Dot, Sum::kRowsOfBlocks>({p, blocks, stride, x, length, width, out, fresh});
}

}  // namespace
}  // namespace cpu
}  // namespace idcore
