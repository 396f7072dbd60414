// The host-device contract of `align_face`: plain data, and the geometry that CPU and CUDA share.
//
// A face's matrix takes picture pixels to chip pixels, (0, 0) in the centre of the first pixel of each. All
// strides are in elements.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define IDCORE_HOST_DEVICE __host__ __device__
#else
#define IDCORE_HOST_DEVICE
#endif

namespace idcore {

enum class ChipType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kUInt8 = 3 };
// kBilinear: two by two pixels, the fill colour where a pixel is missing, no averaging.
// kBicubic: averaged first where the picture is much larger than the chip, so that nothing aliases.
enum class ChipFilter : int32_t { kBilinear = 0, kBicubic = 1 };

// Pictures of one call. A fixed array keeps the struct plain, so that it can be a kernel argument.
constexpr int32_t kMaxPictures = 16;

struct Picture {
  const uint8_t* data;  // red, green, blue; element (y, x, channel)
  int64_t height;
  int64_t width;
  int64_t stride_y;
  int64_t stride_x;
  int64_t stride_channel;
};

struct AlignFaceParams {
  int64_t faces;
  int64_t height;  // of a chip
  int64_t width;
  int32_t num_pictures;  // at least 1
  ChipFilter filter;
  Picture picture[kMaxPictures];
  const int32_t* picture_of;  // [faces], clamped into 0..num_pictures-1; null: the first for all
  const double* matrix;       // [faces, 2, 3]
  // Out: element (face, channel, y, x). uint8: rounded and clamped to 0..255. Else (pixel - mean) / std of
  // the channel, where pixel is rounded and clamped as for uint8 if `rounded`, else only clamped.
  void* out;
  ChipType type;
  int32_t rounded;
  int64_t stride_face;
  int64_t stride_channel;
  int64_t stride_y;
  int64_t stride_x;
  int32_t bgr;    // out's channels: 0 red, green, blue; 1 blue, green, red
  float fill[3];  // outside of the picture, 0..255; these three are always red, green, blue
  float mean[3];
  float std[3];
};

// How one face is sampled. Sample (i, j) of `oversample` times the chip's size lies at x of the picture
//   back[0] * cx + back[1] * cy + back[2],   cx = (j + 0.5) / oversample - 0.5, cy likewise from i
// and y from back[3..5]. The picture is first averaged over blocks of shrink x shrink pixels from its corner
// (the last row and column over what is there), where x becomes (x + 0.5) / shrink - 0.5, y likewise. A chip
// pixel is the mean of its oversample x oversample samples.
//
// Bicubic (a = -1): a sample whose block-averaged position is not in [-0.5, size - 0.5) is the fill colour,
// pixels beyond the edge repeat it; each sample is clamped to 0..255.
struct ChipGeometry {
  bool usable;  // false: the matrix has no scale or no inverse; the whole chip is fill
  int64_t oversample;
  int64_t shrink;
  double back[6];
};

IDCORE_HOST_DEVICE inline ChipGeometry chip_geometry(const double* m, ChipFilter filter) {
  ChipGeometry g{};
  const double det = m[0] * m[4] - m[1] * m[3];
  const double squared = m[0] * m[0] + m[3] * m[3];
  // Comparisons with NaN are false; 1e300 keeps infinity out.
  g.usable = det * det > 0.0 && det * det < 1e300 && squared > 0.0 && squared < 1e300 && m[2] - m[2] == 0.0 &&
             m[5] - m[5] == 0.0;
  if (!g.usable) return g;
  g.back[0] = m[4] / det;
  g.back[1] = -m[1] / det;
  g.back[2] = (m[1] * m[5] - m[4] * m[2]) / det;
  g.back[3] = -m[3] / det;
  g.back[4] = m[0] / det;
  g.back[5] = (m[3] * m[2] - m[0] * m[5]) / det;
  g.oversample = 1;
  g.shrink = 1;
  if (filter == ChipFilter::kBicubic && squared < 1.0) {
    g.oversample = 2;
    // The largest k with k * 2 * scale <= 1: k x k pixels are averaged and 2 x 2 samples taken per chip
    // pixel, which keeps both steps within what they resolve. A block wider than this averages a whole
    // picture.
    const double k = 0.5 / std::sqrt(squared);
    g.shrink = k < 1.0 ? 1 : k > 65536.0 ? 65536 : static_cast<int64_t>(k);
  }
  return g;
}

// Weights of the four neighbours at -1, 0, 1, 2 for a position d in [0, 1) behind the second.
IDCORE_HOST_DEVICE inline void cubic_weights(float d, float w[4]) {
  const float e = 1.0f - d;
  w[0] = -d * e * e;
  w[1] = 1.0f + d * d * (d - 2.0f);
  w[2] = 1.0f + e * e * (e - 2.0f);
  w[3] = -e * d * d;
}

}  // namespace idcore
