// What both kernels of `id_attention` receive.
#pragma once

#include "cuda/warp.cuh"
#include "id_attention.h"

namespace idcore {
namespace cuda {

struct Task {
  IdAttentionParams p;
  uint16_t* text;  // h of every row. [B, H, Lq, D]
  float* share;    // [n, B, H, Lq]
  float* sums;     // [blocks of rows, n, 2, B * H, D]
  int32_t blocks;  // of attend_kernel along the rows
  bool aligned;    // rows of q, K, V and out start at multiples of 16 bytes
};

IDCORE_DEVICE const uint16_t* head_of(const HeadTensor& t, int64_t batch, int64_t b, int64_t head) {
  return static_cast<const uint16_t*>(t.data) + b * t.batch / batch * t.stride_batch + head * t.stride_head;
}

IDCORE_DEVICE float mask_at(const Identity& id, int64_t b, int64_t row, int64_t lq) {
  if (row >= lq) return 0.f;
  return id.mask ? id.mask[b * id.mask_stride_batch + row * id.mask_stride_row] : 1.f;
}

IDCORE_DEVICE float scale_of(const Identity& id, int64_t b) {
  return id.scale_data ? id.scale_data[b * id.scale_stride] : id.scale;
}

}  // namespace cuda
}  // namespace idcore
