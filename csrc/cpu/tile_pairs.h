// Operands of the bf16 dot product: 32-bit words with two neighbours of the index that a product sums over.
// In units with IDC_PAIRS alone.
#pragma once

#include "cpu/tile_values.h"

namespace idcore {
namespace cpu {
namespace {

// [key][kRows] floats, times `gain` per row, to [key / 2][kRows] pairs of keys. `out` may be `scores`.
IDC_NOINLINE void to_pairs(const float* scores, int64_t length, const float* gain, float* out) {
  const V g0 = load(gain), g1 = load(gain + kLanes);
  for (int64_t t = 0; t < length; t += 2) {
    const float* a = scores + t * kRows;
    const bool alone = t + 1 == length;
    const V a0 = mul(g0, load(a)), a1 = mul(g1, load(a + kLanes));
    const V b0 = alone ? zero() : mul(g0, load(a + kRows)),
            b1 = alone ? zero() : mul(g1, load(a + kRows + kLanes));
    store(out + t / 2 * kRows, narrow_pairs(a0, b0));
    store(out + t / 2 * kRows + kLanes, narrow_pairs(a1, b1));
  }
#if defined(IDC_TILES)
  for (int64_t w = ceil_div(length, 2); w < whole_tiles(ceil_div(length, 2)); ++w) {
    store(out + w * kRows, zero());
    store(out + w * kRows + kLanes, zero());
  }
#endif
}

IDC_INLINE void to_pairs(const float* scores, int64_t length, float* out) {
  alignas(64) float one[kRows];
  store(one, all(1.0f));
  store(one + kLanes, all(1.0f));
  to_pairs(scores, length, one, out);
}

// In place: [token][kRows] floats to [token][kRows / 2] pairs of rows.
IDC_NOINLINE void to_row_pairs(float* weights, int64_t length) {
  for (int64_t t = 0; t < length; ++t)
    store(weights + t * kLanes,
          narrow_neighbours(load(weights + t * kRows), load(weights + t * kRows + kLanes)));
}

// Rows of bf16 to [row / 2][padded(head_dim)] pairs of rows; rows from `valid` on are zeros and not read.
IDC_NOINLINE void load_row_pairs(const char* base, int64_t row_bytes, int64_t valid, int64_t rows,
                                 int64_t head_dim, float* out) {
  const int64_t width = padded(head_dim);
  for (int64_t r = 0; r < rows; r += 2) {
    const auto* a = reinterpret_cast<const uint16_t*>(base + r * row_bytes);
    const auto* b = reinterpret_cast<const uint16_t*>(base + (r + 1 < valid ? r + 1 : r) * row_bytes);
    for (int64_t d = 0; d < width; d += kLanes, out += kLanes) {
      const int64_t n = smaller(head_dim - d, kLanes);
      store(out, load_pairs(a + d, r < valid ? n : 0, b + d, r + 1 < valid ? n : 0));
    }
  }
}

}  // namespace
}  // namespace cpu
}  // namespace idcore
