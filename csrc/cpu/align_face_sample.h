// A tile of a chip of `align_face`: sample, round, normalise, store. Included once by each instruction-set
// unit, behind its vectors; everything is local to that unit.
#pragma once

#include "cpu/align_face_blocks.h"

namespace idcore {
namespace cpu {
namespace {

// Four pixels side by side.
typedef float Wide __attribute__((vector_size(64)));

IDC_INLINE Quad fill_of(const AlignFaceParams& p) { return Quad{p.fill[0], p.fill[1], p.fill[2], 0.0f}; }
IDC_INLINE Quad clamped(const Quad& q) {
  const Quad low = {}, high = {255.0f, 255.0f, 255.0f, 255.0f};
  const Quad above = q > low ? q : low;
  return above < high ? above : high;
}

// cubic_weights of csrc/align_face.h for the four neighbours at once.
IDC_INLINE Quad four_weights(float d) {
  const Quad c0 = {0.0f, 1.0f, 0.0f, 0.0f}, c1 = {-1.0f, 0.0f, 1.0f, 0.0f};
  const Quad c2 = {2.0f, -2.0f, 1.0f, -1.0f}, c3 = {-1.0f, 1.0f, -1.0f, 1.0f};
  return c0 + d * (c1 + d * (c2 + d * c3));
}

// Bicubic value at x, y of the block-averaged picture.
IDC_INLINE Quad cubic(const ChipTile& t, double x, double y) {
  // Truncation of what is at least 0.5 is the floor.
  const int64_t ix = static_cast<int64_t>(x + 1.0) - 1, iy = static_cast<int64_t>(y + 1.0) - 1;
  const Quad wx = four_weights(static_cast<float>(x - static_cast<double>(ix)));
  const Quad wy = four_weights(static_cast<float>(y - static_cast<double>(iy)));
  const int64_t width = t.box.x1 - t.box.x0;
  const float* p = t.pixels + ((iy - 1 - t.box.y0) * width + ix - 1 - t.box.x0) * 4;
  Wide sum = {};
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    Wide row;
    __builtin_memcpy(&row, p + r * width * 4, 64);
    sum += wy[r] * row;
  }
  Quad part[4];
  __builtin_memcpy(part, &sum, 64);
  return clamped(wx[0] * part[0] + wx[1] * part[1] + (wx[2] * part[2] + wx[3] * part[3]));
}

// Pixels [t.x0, t.x1) of row y, each the mean of kOver x kOver samples.
template <int kOver>
IDC_INLINE void cubic_row(const ChipTile& t, int64_t y, float* to) {
  const ChipGeometry& g = t.geometry;
  const double step = 1.0 / kOver, half = 0.5 * step - 0.5, per = 1.0 / static_cast<double>(g.shrink);
  const double right = static_cast<double>((t.picture->width + g.shrink - 1) / g.shrink) - 0.5;
  const double bottom = static_cast<double>((t.picture->height + g.shrink - 1) / g.shrink) - 0.5;
  const double ux = g.back[0] * per, vx = g.back[3] * per, shift = 0.5 * per - 0.5;
  const Quad outside = fill_of(*t.params);
  for (int64_t x = t.x0; x < t.x1; ++x) {
    Quad sum = {};
    for (int i = 0; i < kOver; ++i) {
      const double cy = static_cast<double>(y) + half + i * step;
      const double u0 = (g.back[1] * cy + g.back[2]) * per + shift;
      const double v0 = (g.back[4] * cy + g.back[5]) * per + shift;
#pragma GCC unroll 2
      for (int j = 0; j < kOver; ++j) {
        const double cx = static_cast<double>(x) + half + j * step;
        const double u = ux * cx + u0, v = vx * cx + v0;
        const bool inside = u >= -0.5 && u < right && v >= -0.5 && v < bottom;
        sum += inside ? cubic(t, u, v) : outside;
      }
    }
    sum *= 1.0f / (kOver * kOver);
    __builtin_memcpy(to + 4 * (x - t.x0), &sum, 16);
  }
}

IDC_INLINE Quad pixel_at(const ChipTile& t, int64_t x, int64_t y) {
  const Picture& p = *t.picture;
  if (x < 0 || x >= p.width || y < 0 || y >= p.height) return fill_of(*t.params);
  const uint8_t* at = p.data + y * p.stride_y + x * p.stride_x;
  return Quad{static_cast<float>(at[0]), static_cast<float>(at[p.stride_channel]),
              static_cast<float>(at[2 * p.stride_channel]), 0.0f};
}

IDC_INLINE Quad widened(const uint8_t* p) {
  Bytes b;
  __builtin_memcpy(&b, p, 4);
  return __builtin_convertvector(b, Quad);
}

IDC_INLINE void linear_row(const ChipTile& t, int64_t y, float* to) {
  const double* back = t.geometry.back;
  const Picture& p = *t.picture;
  const int64_t step = p.stride_x;
  const bool dense = (step == 3 || step == 4) && p.stride_channel == 1;
  const double width = static_cast<double>(p.width), height = static_cast<double>(p.height);
  for (int64_t x = t.x0; x < t.x1; ++x) {
    const double cx = static_cast<double>(x), cy = static_cast<double>(y);
    double u = back[0] * cx + back[1] * cy + back[2], v = back[3] * cx + back[4] * cy + back[5];
    // One pixel around the picture is all that blends. A NaN (overflow of a far shift) lies outside.
    u = !(u >= -1.0) ? -1.0 : u > width ? width : u;
    v = !(v >= -1.0) ? -1.0 : v > height ? height : v;
    const int64_t ix = static_cast<int64_t>(u + 1.0) - 1, iy = static_cast<int64_t>(v + 1.0) - 1;
    const float fx = static_cast<float>(u - static_cast<double>(ix));
    const float fy = static_cast<float>(v - static_cast<double>(iy));
    Quad a, b, c, d;
    if (dense && ix >= 0 && ix + 2 < p.width && iy >= 0 && iy + 1 < p.height) {
      const uint8_t* at = p.data + iy * p.stride_y + ix * step;
      a = widened(at), b = widened(at + step);
      c = widened(at + p.stride_y), d = widened(at + p.stride_y + step);
    } else {
      a = pixel_at(t, ix, iy), b = pixel_at(t, ix + 1, iy);
      c = pixel_at(t, ix, iy + 1), d = pixel_at(t, ix + 1, iy + 1);
    }
    const Quad top = a * (1.0f - fx) + b * fx, bottom = c * (1.0f - fx) + d * fx;
    const Quad value = clamped(top * (1.0f - fy) + bottom * fy);
    __builtin_memcpy(to + 4 * (x - t.x0), &value, 16);
  }
}

IDC_INLINE float rounded(float x) { return (x + 12582912.0f) - 12582912.0f; }  // half to even

template <class T>
IDC_INLINE void spread(void* out, int64_t at, int64_t stride, const T* row, int64_t count) {
  T* to = static_cast<T*>(out) + at;
  for (int64_t i = 0; i < count; ++i) to[i * stride] = row[i];
}

// One channel of a row of the tile.
IDC_INLINE void store_channel(const ChipTile& t, int64_t y, int c, float* row) {
  const AlignFaceParams& p = *t.params;
  const int64_t count = t.x1 - t.x0;
  const int64_t at = t.face * p.stride_face + (p.bgr != 0 ? 2 - c : c) * p.stride_channel + y * p.stride_y +
                     t.x0 * p.stride_x;
  if (p.type == ChipType::kUInt8) {
    uint8_t bytes[kChipTile];
    for (int64_t i = 0; i < count; ++i) bytes[i] = static_cast<uint8_t>(rounded(row[i]));
    return spread(p.out, at, p.stride_x, bytes, count);
  }
  if (p.rounded != 0) {
    for (int64_t i = 0; i < kChipTile; ++i) row[i] = rounded(row[i]);
  }
  for (int64_t i = 0; i < kChipTile; ++i) row[i] = (row[i] - p.mean[c]) / p.std[c];
  if (p.type == ChipType::kFloat32) return spread(p.out, at, p.stride_x, row, count);
  uint16_t half[kChipTile];
  for (int64_t i = 0; i < kChipTile; i += kLanes) {
    const V v = load(row + i);
    p.type == ChipType::kBFloat16 ? store_bf16(half + i, v, kLanes) : store_fp16(half + i, v, kLanes);
  }
  spread(p.out, at, p.stride_x, half, count);
}

void chip_tile(const ChipTile& t) {
  const bool bicubic = t.params->filter == ChipFilter::kBicubic;
  if (t.box.pixels() > 0) fill_box(t);
  float pixels[4 * kChipTile] = {}, channel[kChipTile];
  const Quad outside = fill_of(*t.params);
  for (int64_t y = t.y0; y < t.y1; ++y) {
    if (!t.geometry.usable) {
      for (int64_t i = 0; i < kChipTile; ++i) __builtin_memcpy(pixels + 4 * i, &outside, 16);
    } else if (bicubic) {
      t.geometry.oversample == 2 ? cubic_row<2>(t, y, pixels) : cubic_row<1>(t, y, pixels);
    } else {
      linear_row(t, y, pixels);
    }
    for (int c = 0; c < 3; ++c) {
      for (int64_t i = 0; i < kChipTile; ++i) channel[i] = pixels[4 * i + c];
      store_channel(t, y, c, channel);
    }
  }
}

}  // namespace
}  // namespace cpu
}  // namespace idcore
