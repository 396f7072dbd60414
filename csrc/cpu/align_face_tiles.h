// `align_face` on the CPU: the driver cuts chips into tiles, an instruction-set unit samples them.
#pragma once

#include "align_face.h"
#include "cpu/kernels.h"

namespace idcore {
namespace cpu {

// Side of the tiles that one thread works on; a tile's piece of the picture stays in the second-level cache.
constexpr int64_t kChipTile = 32;

// The block-averaged pixels [y0, y1) x [x0, x1) that a tile's samples read: 4 floats each (red, green, blue,
// unused), where the pixels beyond the picture's edge repeat it. Empty for bilinear, which reads the picture.
struct BlockBox {
  int64_t x0, x1, y0, y1;
  int64_t pixels() const { return (x1 - x0) * (y1 - y0); }
};

struct ChipTile {
  const AlignFaceParams* params;
  const Picture* picture;
  ChipGeometry geometry;
  int64_t face;
  int64_t x0, x1, y0, y1;  // chip pixels
  BlockBox box;
  float* pixels;   // box.pixels() * 4
  uint32_t* sums;  // 4 * shrink * (box.x1 - box.x0)
};

// Chips of all faces. Arguments are trusted; results do not depend on the number of threads.
void align_face(const AlignFaceParams& params, const Kernels& kernels);

}  // namespace cpu
}  // namespace idcore
