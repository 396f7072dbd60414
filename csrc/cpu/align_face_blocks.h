// The pixels that a bicubic tile of `align_face` reads, averaged over blocks and widened to floats. Included
// once by each instruction-set unit, behind its vectors; everything is local to that unit.
#pragma once

#include "cpu/align_face_tiles.h"

namespace idcore {
namespace cpu {
namespace {

// One pixel: red, green, blue, unused. The compiler splits it where the unit has no such register.
typedef float Quad __attribute__((vector_size(16)));
typedef uint8_t Bytes __attribute__((vector_size(4)));

IDC_INLINE int64_t within(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// Bytes from pixel to pixel where the three channels lie side by side (4: a byte that nobody wants), else 0.
IDC_INLINE int64_t dense_step(const Picture& p) {
  return p.stride_channel == 1 && (p.stride_x == 3 || p.stride_x == 4) ? p.stride_x : 0;
}

// sums[kStep * i + c] += pixel i of a row, over `count` pixels.
template <int kStep, class T>
IDC_INLINE void add_row(T* sums, const uint8_t* row, int64_t count, const Picture& p) {
  if (dense_step(p) == kStep) {
    // without the last pixel's fourth byte, which may lie behind the picture
    for (int64_t i = 0; i < kStep * (count - 1) + 3; ++i) sums[i] = static_cast<T>(sums[i] + row[i]);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = 0; c < 3; ++c) {
      sums[kStep * i + c] = static_cast<T>(sums[kStep * i + c] + row[i * p.stride_x + c * p.stride_channel]);
    }
  }
}

// Means of the blocks [first, first + count) of one row of blocks.
template <int kStep, class Sum, class T>
IDC_INLINE void average_row(const Picture& p, int64_t k, int64_t block_row, int64_t first, int64_t count,
                            T* sums, float* to) {
  const int64_t rows = within(p.height - block_row * k, 1, k), at = first * k;
  const int64_t pixels = within(p.width - at, 1, count * k);
  for (int64_t i = 0; i < kStep * pixels; ++i) sums[i] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    add_row<kStep>(sums, p.data + (block_row * k + r) * p.stride_y + at * p.stride_x, pixels, p);
  }
  for (int64_t b = 0; b < count; ++b) {
    const int64_t across = within(pixels - b * k, 1, k);
    const T* s = sums + kStep * b * k;
    Sum red = 0, green = 0, blue = 0;
    for (int64_t i = 0; i < kStep * across; i += kStep) red += s[i], green += s[i + 1], blue += s[i + 2];
    const float per = static_cast<float>(rows * across);
    const Quad mean =
        Quad{static_cast<float>(red), static_cast<float>(green), static_cast<float>(blue), 0.0f} / per;
    __builtin_memcpy(to + 4 * b, &mean, 16);
  }
}

// As average_row for blocks of one pixel. Four bytes are read for three; the last pixel is read by itself, so
// that nothing behind the picture is touched.
template <int kStep>
IDC_INLINE void widen_row(const uint8_t* row, int64_t count, float* to) {
  for (int64_t i = 0; i < count - 1; ++i) {
    Bytes b;
    __builtin_memcpy(&b, row + kStep * i, 4);
    const Quad q = __builtin_convertvector(b, Quad);
    __builtin_memcpy(to + 4 * i, &q, 16);
  }
  for (int64_t c = 0; c < 3; ++c) to[4 * (count - 1) + c] = row[kStep * (count - 1) + c];
  to[4 * count - 1] = 0.0f;
}

template <int kStep>
IDC_NOINLINE void block_row(const ChipTile& t, int64_t row, int64_t first, int64_t count, float* to) {
  const Picture& p = *t.picture;
  const int64_t k = t.geometry.shrink;
  if (k == 1 && dense_step(p) == kStep) {
    return widen_row<kStep>(p.data + row * p.stride_y + first * kStep, count, to);
  }
  // 257 * 255 is the largest number of 16 bit
  if (k <= 257)
    return average_row<kStep, uint32_t>(p, k, row, first, count, reinterpret_cast<uint16_t*>(t.sums), to);
  average_row<kStep, uint64_t>(p, k, row, first, count, t.sums, to);
}

IDC_INLINE void copy_floats(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

// All of the tile's box. It is not empty, and so reaches at least one pixel of the picture.
IDC_NOINLINE void fill_box(const ChipTile& t) {
  const BlockBox& box = t.box;
  const int64_t k = t.geometry.shrink, width = box.x1 - box.x0;
  const int64_t last_x = (t.picture->width + k - 1) / k - 1, last_y = (t.picture->height + k - 1) / k - 1;
  const int64_t first = within(box.x0, 0, last_x), end = within(box.x1 - 1, 0, last_x) + 1;
  const int64_t before = within(first - box.x0, 0, width - 1);
  for (int64_t y = box.y0; y < box.y1; ++y) {
    float* row = t.pixels + (y - box.y0) * width * 4;
    const int64_t from = within(y, 0, last_y);
    if (y > box.y0 && from == within(y - 1, 0, last_y)) {
      copy_floats(row, row - width * 4, width * 4);
      continue;
    }
    auto fill = dense_step(*t.picture) == 4 ? block_row<4> : block_row<3>;
    fill(t, from, first, end - first, row + before * 4);
    for (int64_t x = 0; x < before; ++x) copy_floats(row + 4 * x, row + 4 * before, 4);
    for (int64_t x = before + end - first; x < width; ++x) copy_floats(row + 4 * x, row + 4 * (x - 1), 4);
  }
}

}  // namespace
}  // namespace cpu
}  // namespace idcore
