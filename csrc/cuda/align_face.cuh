// Face chips: warp, resample, normalise and lay out (csrc/align_face.h says what a sample is).
//
// A block makes 16 x 16 samples of one chip: 8 x 8 pixels where a pixel is the mean of 2 x 2 samples. Where
// the picture is averaged first, the block puts the averages that its samples read into shared memory, each
// computed once; other pictures are read through the cache.
#pragma once

#include "align_face.h"
#include "cuda/warp.cuh"

namespace idcore {
namespace cuda {

constexpr int kChipSide = 16;  // samples
// A similarity's samples, at most 1.5 averages apart, reach 39 of them at 45 degrees.
constexpr int kChipAverages = 40;
constexpr int kChipThreads = kChipSide * kChipSide;

struct Colour {
  float c[3];
};

// The averages of [x0, x1) x [y0, y1) in shared memory; empty where they would not fit.
struct AverageBox {
  int x0, x1, y0, y1;
};

struct ChipJob {
  ChipGeometry geometry;
  AverageBox box;
  int across, down;  // averages of the whole picture
  int64_t face;
  int picture;
};

// Shared memory of a block.
struct ChipRoom {
  ChipJob job;
  Colour average[kChipAverages * kChipAverages];
};

IDCORE_DEVICE int64_t bounded(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// Position on one axis, in pixels of the averaged picture.
IDCORE_DEVICE double position(const double* back, double cx, double cy, double shrink) {
  const double x = back[0] * cx + back[1] * cy + back[2];
  return shrink == 1.0 ? x : (x + 0.5) / shrink - 0.5;
}

// What the samples from pixel (x, y) of the chip on read on one axis: from one pixel before the lowest to two
// behind the highest, and one more on each side for rounding; pixels beyond the edge repeat it.
IDCORE_DEVICE void reach(const double* back, const ChipGeometry& g, int x, int y, int averages, int* from,
                         int* to) {
  double low = 1e9, high = -8.0;
  const double os = static_cast<double>(g.oversample), last = (kChipSide - 1) / os;
  for (int corner = 0; corner < 4; ++corner) {
    const double cx = x + 0.5 / os - 0.5 + (corner & 1) * last,
                 cy = y + 0.5 / os - 0.5 + (corner >> 1) * last;
    const double at = position(back, cx, cy, static_cast<double>(g.shrink));
    low = at < low ? (at < -8.0 ? -8.0 : at) : low;
    high = at > high ? (at > 1e9 ? 1e9 : at) : high;
  }
  *from = static_cast<int>(bounded(static_cast<int64_t>(low) - 2, 0, averages - 1));
  *to = static_cast<int>(bounded(static_cast<int64_t>(high) + 4, *from + 1, averages));
}

// One thread's work; the others read it from shared memory.
IDCORE_DEVICE void prepare(const AlignFaceParams& p, ChipJob& job, int64_t face) {
  job.face = face;
  job.picture = p.picture_of ? static_cast<int>(bounded(p.picture_of[face], 0, p.num_pictures - 1)) : 0;
  job.geometry = chip_geometry(p.matrix + 6 * face, p.filter);
  if (!job.geometry.usable) return;
  const Picture& from = p.picture[job.picture];
  const int64_t k = job.geometry.shrink;
  job.across = static_cast<int>((from.width + k - 1) / k);
  job.down = static_cast<int>((from.height + k - 1) / k);
}

// (x, y): the tile's first pixel of the chip.
IDCORE_DEVICE void prepare_box(ChipJob& job, int x, int y) {
  AverageBox& box = job.box;
  box = {0, 0, 0, 0};
  if (!job.geometry.usable || job.geometry.shrink == 1) return;
  AverageBox wanted;
  reach(job.geometry.back, job.geometry, x, y, job.across, &wanted.x0, &wanted.x1);
  reach(job.geometry.back + 3, job.geometry, x, y, job.down, &wanted.y0, &wanted.y1);
  if (wanted.x1 - wanted.x0 <= kChipAverages && wanted.y1 - wanted.y0 <= kChipAverages) box = wanted;
}

// Sum over every lanes-th pixel of a row of a block of pixels.
IDCORE_DEVICE void add_run(const Picture& from, int64_t x, int64_t y, int64_t across, int64_t lane,
                           int64_t lanes, int64_t (&sum)[3]) {
  const uint8_t* row = from.data + y * from.stride_y + x * from.stride_x;
  uint32_t red = 0, green = 0, blue = 0;  // a block is at most 65536 pixels wide
  IDCORE_UNROLL_BY_4
  for (int64_t i = lane; i < across; i += lanes) {
    const uint8_t* at = row + i * from.stride_x;
    red += at[0];
    green += at[from.stride_channel];
    blue += at[2 * from.stride_channel];
  }
  sum[0] += red;
  sum[1] += green;
  sum[2] += blue;
}

// This lane's share of the sums over block (bx, by) of shrink x shrink pixels, and the pixels of the block.
// Sums are whole numbers, exact in float up to blocks of 256 x 256.
IDCORE_DEVICE Colour block_sum(const Picture& from, int64_t k, int bx, int by, int lane, int lanes,
                               float* pixels) {
  const int64_t x = bx * k, y = by * k;
  const int64_t across = from.width - x < k ? from.width - x : k,
                rows = from.height - y < k ? from.height - y : k;
  int64_t sum[3] = {0, 0, 0};
  for (int64_t r = 0; r < rows; ++r) add_run(from, x, y + r, across, lane, lanes, sum);
  *pixels = static_cast<float>(rows * across);
  return {{static_cast<float>(sum[0]), static_cast<float>(sum[1]), static_cast<float>(sum[2])}};
}

// All averages of the box, each by as many lanes as its block is wide.
IDCORE_DEVICE void fill_box(const Picture& from, ChipRoom& room) {
  const AverageBox& box = room.job.box;
  const int64_t k = room.job.geometry.shrink;
  const int lanes = k < 4 ? 1 : k < 24 ? 8 : 32;
  const int width = box.x1 - box.x0, total = width * (box.y1 - box.y0);
  const int own = thread_index() % lanes;
  for (int first = 0; first < total; first += thread_count() / lanes) {
    const int item = first + thread_index() / lanes;
    Colour got = {{0.f, 0.f, 0.f}};
    float pixels = 1.f;
    if (item < total)
      got = block_sum(from, k, box.x0 + item % width, box.y0 + item / width, own, lanes, &pixels);
    for (int step = 1; step < lanes; step *= 2)
      for (int c = 0; c < 3; ++c) got.c[c] += exchange_xor(got.c[c], step);
    for (int c = 0; c < 3; ++c)
      if (item < total && own == 0) room.average[item].c[c] = got.c[c] / pixels;
  }
}

// A pixel of the averaged picture; (x, y) inside of it.
IDCORE_DEVICE Colour averaged(const Picture& from, const ChipRoom& room, int x, int y) {
  const AverageBox& box = room.job.box;
  if (x >= box.x0 && x < box.x1 && y >= box.y0 && y < box.y1)
    return room.average[(y - box.y0) * (box.x1 - box.x0) + x - box.x0];
  float pixels;
  Colour sum = block_sum(from, room.job.geometry.shrink, x, y, 0, 1, &pixels);
  for (int c = 0; c < 3; ++c) sum.c[c] /= pixels;
  return sum;
}

IDCORE_DEVICE float grey(float x) { return x < 0.f ? 0.f : x > 255.f ? 255.f : x; }

IDCORE_DEVICE Colour bicubic(const AlignFaceParams& p, const ChipRoom& room, double x, double y) {
  const ChipJob& job = room.job;
  if (!(x >= -0.5 && x < job.across - 0.5 && y >= -0.5 && y < job.down - 0.5))
    return {{p.fill[0], p.fill[1], p.fill[2]}};
  const int ix = static_cast<int>(x + 1.0) - 1, iy = static_cast<int>(y + 1.0) - 1;
  float wx[4], wy[4];
  cubic_weights(static_cast<float>(x - ix), wx);
  cubic_weights(static_cast<float>(y - iy), wy);
  Colour sum = {{0.f, 0.f, 0.f}};
  for (int r = 0; r < 4; ++r) {
    const int row = static_cast<int>(bounded(iy + r - 1, 0, job.down - 1));
    Colour line = {{0.f, 0.f, 0.f}};
    IDCORE_UNROLL
    for (int t = 0; t < 4; ++t) {
      const int column = static_cast<int>(bounded(ix + t - 1, 0, job.across - 1));
      const Colour at = averaged(p.picture[job.picture], room, column, row);
      for (int c = 0; c < 3; ++c) line.c[c] += wx[t] * at.c[c];
    }
    for (int c = 0; c < 3; ++c)
      sum.c[c] += (r == 0 ? wy[0] : r == 1 ? wy[1] : r == 2 ? wy[2] : wy[3]) * line.c[c];
  }
  for (int c = 0; c < 3; ++c) sum.c[c] = grey(sum.c[c]);
  return sum;
}

IDCORE_DEVICE Colour pixel_or_fill(const AlignFaceParams& p, const Picture& from, int64_t x, int64_t y) {
  if (x < 0 || x >= from.width || y < 0 || y >= from.height) return {{p.fill[0], p.fill[1], p.fill[2]}};
  const uint8_t* at = from.data + y * from.stride_y + x * from.stride_x;
  return {{static_cast<float>(at[0]), static_cast<float>(at[from.stride_channel]),
           static_cast<float>(at[2 * from.stride_channel])}};
}

IDCORE_DEVICE Colour bilinear(const AlignFaceParams& p, const Picture& from, double x, double y) {
  const double width = static_cast<double>(from.width), height = static_cast<double>(from.height);
  x = x < -1.0 ? -1.0 : x > width ? width : x;  // one pixel around the picture is all that blends
  y = y < -1.0 ? -1.0 : y > height ? height : y;
  const int64_t ix = static_cast<int64_t>(x + 1.0) - 1, iy = static_cast<int64_t>(y + 1.0) - 1;
  const float fx = static_cast<float>(x - static_cast<double>(ix)),
              fy = static_cast<float>(y - static_cast<double>(iy));
  const Colour a = pixel_or_fill(p, from, ix, iy), b = pixel_or_fill(p, from, ix + 1, iy);
  const Colour c = pixel_or_fill(p, from, ix, iy + 1), d = pixel_or_fill(p, from, ix + 1, iy + 1);
  Colour got;
  for (int i = 0; i < 3; ++i) {
    const float top = a.c[i] * (1.f - fx) + b.c[i] * fx, bottom = c.c[i] * (1.f - fx) + d.c[i] * fx;
    got.c[i] = grey(top * (1.f - fy) + bottom * fy);
  }
  return got;
}

// Channel c (0 red) of a pixel of the chip.
IDCORE_DEVICE void store_channel(const AlignFaceParams& p, int64_t face, int x, int y, int c, float value) {
  const int64_t at =
      face * p.stride_face + (p.bgr ? 2 - c : c) * p.stride_channel + y * p.stride_y + x * p.stride_x;
  if (p.type == ChipType::kUInt8) {
    static_cast<uint8_t*>(p.out)[at] = static_cast<uint8_t>(rintf(value));
    return;
  }
  const float level = p.rounded ? rintf(value) : value;
  const float wanted = (level - p.mean[c]) / p.std[c];
  if (p.type == ChipType::kFloat32) {
    static_cast<float*>(p.out)[at] = wanted;
  } else {
    const uint32_t bits =
        p.type == ChipType::kBFloat16 ? BFloat16::pack(wanted, 0.f) : Half::pack(wanted, 0.f);
    static_cast<uint16_t*>(p.out)[at] = static_cast<uint16_t>(bits);
  }
}

IDCORE_DEVICE int tiles_of(int64_t pixels, int64_t oversample) {
  return static_cast<int>((pixels * oversample + kChipSide - 1) / kChipSide);
}

// One tile of the job's chip. Lanes that make one pixel together stand side by side.
IDCORE_DEVICE void make_tile(const AlignFaceParams& p, const ChipRoom& room, int x0, int y0) {
  const ChipJob& job = room.job;
  const int os = static_cast<int>(job.geometry.oversample), per = os * os, side = kChipSide / os;
  const int pixel = thread_index() / per, sub = thread_index() % per;
  const int x = x0 + pixel % side, y = y0 + pixel / side;
  const double cx = x + (sub % os + 0.5) / os - 0.5, cy = y + (sub / os + 0.5) / os - 0.5;
  const double shrink = static_cast<double>(job.geometry.shrink);
  const double u = position(job.geometry.back, cx, cy, shrink),
               v = position(job.geometry.back + 3, cx, cy, shrink);
  const bool inside = x < p.width && y < p.height;
  Colour got = {{0.f, 0.f, 0.f}};
  if (inside)
    got =
        p.filter == ChipFilter::kBicubic ? bicubic(p, room, u, v) : bilinear(p, p.picture[job.picture], u, v);
  for (int step = 1; step < per; step *= 2)
    for (int c = 0; c < 3; ++c) got.c[c] += exchange_xor(got.c[c], step);
  if (!inside) return;
  IDCORE_UNROLL
  for (int c = 0; c < 3; ++c)
    if (c % per == sub) store_channel(p, job.face, x, y, c, got.c[c] / static_cast<float>(per));
}

// The chip of a matrix that has no inverse.
IDCORE_DEVICE void make_fill(const AlignFaceParams& p, int64_t face, int x0, int y0) {
  const int x = x0 + thread_index() % kChipSide, y = y0 + thread_index() / kChipSide;
  if (x >= p.width || y >= p.height) return;
  for (int c = 0; c < 3; ++c) store_channel(p, face, x, y, c, p.fill[c]);
}

// kChipThreads threads; blocks along the chip's rows and columns for the finest sampling, then the faces.
// Where a face is sampled once a pixel, a quarter of its blocks has work.
IDCORE_DEVICE void align_block(const AlignFaceParams& p) {
  ChipRoom& room = *reinterpret_cast<ChipRoom*>(shared_memory());
  const int most = p.filter == ChipFilter::kBicubic ? 2 : 1;
  const int columns = tiles_of(p.width, most), rows = tiles_of(p.height, most);
  const int tile = block_x() % (columns * rows);
  if (thread_index() == 0) prepare(p, room.job, block_x() / (columns * rows));
  sync_block();
  const ChipJob& job = room.job;
  const int os = job.geometry.usable ? static_cast<int>(job.geometry.oversample) : 1;
  const int x0 = tile % columns * (kChipSide / os), y0 = tile / columns * (kChipSide / os);
  if (x0 >= p.width || y0 >= p.height) return;
  if (!job.geometry.usable) return make_fill(p, job.face, x0, y0);
  if (thread_index() == 0) prepare_box(room.job, x0, y0);
  sync_block();
  if (job.box.x1 > job.box.x0) fill_box(p.picture[job.picture], room);
  sync_block();
  make_tile(p, room, x0, y0);
}

}  // namespace cuda
}  // namespace idcore
