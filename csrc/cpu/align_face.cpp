#include "cpu/align_face_tiles.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "cpu/team.h"

namespace idcore {
namespace cpu {
namespace {

// Below this many samples waking the other threads costs more than they bring.
constexpr int64_t kSerialSamples = 1 << 12;

int64_t blocks_of(int64_t pixels, int64_t shrink) { return (pixels + shrink - 1) / shrink; }

// Lowest and highest of an affine function over the samples of a tile, kept where an integer can hold it.
struct Range {
  double low, high;
};
Range range_of(const double* back, const ChipTile& t, double limit) {
  const double os = static_cast<double>(t.geometry.oversample), k = static_cast<double>(t.geometry.shrink);
  const double half = 0.5 / os - 0.5;
  Range r{1e300, -1e300};
  for (const double cx : {t.x0 + half, t.x1 - 1 - half}) {
    for (const double cy : {t.y0 + half, t.y1 - 1 - half}) {
      const double x = (back[0] * cx + back[1] * cy + back[2] + 0.5) / k - 0.5;
      r.low = std::min(r.low, x);
      r.high = std::max(r.high, x);
    }
  }
  r.low = std::clamp(r.low, -8.0, limit + 8.0);
  r.high = std::clamp(r.high, -8.0, limit + 8.0);
  return r;
}

// From one pixel before the lowest sample's to two behind the highest one's, one more for rounding, and no
// further outside of the picture than samples inside of it read.
void side_of(const double* back, const ChipTile& t, int64_t pixels, int64_t* from, int64_t* to) {
  const int64_t blocks = blocks_of(pixels, t.geometry.shrink);
  const Range r = range_of(back, t, static_cast<double>(blocks));
  *from = std::max<int64_t>(static_cast<int64_t>(std::floor(r.low)) - 2, -2);
  *to = std::min<int64_t>(static_cast<int64_t>(std::floor(r.high)) + 4, blocks + 2);
  *to = std::max(*from, *to);
}

class Call {
 public:
  Call(const AlignFaceParams& params, const Kernels& kernels) : p_(params), k_(kernels) {
    across_ = (p_.width + kChipTile - 1) / kChipTile;
    down_ = (p_.height + kChipTile - 1) / kChipTile;
    items_ = p_.faces * across_ * down_;
    geometry_.resize(static_cast<size_t>(p_.faces));
    for (int64_t f = 0; f < p_.faces; ++f) geometry_[f] = chip_geometry(p_.matrix + 6 * f, p_.filter);
    for (int64_t i = 0; i < items_; ++i) {
      const ChipTile t = tile(i);
      floats_ = std::max(floats_, (t.box.pixels() * 4 + 15) / 16 * 16);
      sums_ = std::max(sums_, (4 * t.geometry.shrink * (t.box.x1 - t.box.x0) + 15) / 16 * 16);
    }
    threads_ = team_size(p_.faces * p_.height * p_.width, kSerialSamples);
  }

  void run() {
    // What a thread keeps from call to call: fresh pages would cost more than the sampling.
    static thread_local std::vector<uint32_t> scratch;
    const size_t words = static_cast<size_t>(floats_ + sums_) * threads_;
    if (scratch.size() < words) scratch.resize(words);
    uint32_t* base = scratch.data();
#pragma omp parallel num_threads(threads_)
    {
      uint32_t* own = base + (floats_ + sums_) * thread_number();
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < items_; ++i) {
        ChipTile t = tile(i);
        t.pixels = reinterpret_cast<float*>(own);
        t.sums = own + floats_;
        k_.chip_tile(t);
      }
    }
  }

 private:
  ChipTile tile(int64_t i) const {
    ChipTile t{};
    t.params = &p_;
    t.face = i / (across_ * down_);
    t.geometry = geometry_[t.face];
    const int64_t of = p_.picture_of == nullptr ? 0 : p_.picture_of[t.face];
    t.picture = &p_.picture[std::clamp<int64_t>(of, 0, p_.num_pictures - 1)];
    t.x0 = i % across_ * kChipTile;
    t.y0 = i / across_ % down_ * kChipTile;
    t.x1 = std::min(p_.width, t.x0 + kChipTile);
    t.y1 = std::min(p_.height, t.y0 + kChipTile);
    if (t.geometry.usable && p_.filter == ChipFilter::kBicubic) {
      side_of(t.geometry.back, t, t.picture->width, &t.box.x0, &t.box.x1);
      side_of(t.geometry.back + 3, t, t.picture->height, &t.box.y0, &t.box.y1);
    }
    return t;
  }

  const AlignFaceParams& p_;
  const Kernels& k_;
  std::vector<ChipGeometry> geometry_;
  int64_t across_ = 0, down_ = 0, items_ = 0, floats_ = 0, sums_ = 0;
  int threads_ = 1;
};

}  // namespace

void align_face(const AlignFaceParams& params, const Kernels& kernels) {
  if (params.faces == 0 || params.height == 0 || params.width == 0) return;
  Call(params, kernels).run();
}

}  // namespace cpu
}  // namespace idcore
