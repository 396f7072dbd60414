// What the kernels of `id_attention` receive, and how the work is cut up: a tile is 16 rows times the warps
// of a block, of one head; tiles are counted along the rows, then the heads, then the samples.
#pragma once

#include "cuda/id_attention_plan.h"
#include "cuda/warp.cuh"
#include "id_attention.h"

namespace idcore {
namespace cuda {

struct Task {
  IdAttentionParams p;
  uint16_t* text;       // h of the tiles that leave the chip. [B, H, Lq, D]
  float* share;         // [n, B, H, Lq]
  float* sums;          // [B * H, chunks, n, 2, D]
  int32_t chunks;       // tiles along the rows
  int32_t tiles;        // of all heads and samples
  int32_t slots;        // tiles that a block holds in shared memory
  int32_t slot_offset;  // bytes of shared memory before the first of them
  bool together;        // every block runs at once: a barrier over the grid, then ortho is finished
  bool aligned;         // rows of q, K, V and out start at multiples of 16 bytes
};

// `workspace`: s.total() bytes, aligned to 256.
inline Task task_of(const IdAttentionParams& p, const Sizes& s, void* workspace) {
  unsigned char* const scratch = static_cast<unsigned char*>(workspace);
  Task task{};
  task.p = p;
  task.text = reinterpret_cast<uint16_t*>(scratch);
  task.share = reinterpret_cast<float*>(scratch + s.text_bytes);
  task.sums = reinterpret_cast<float*>(scratch + s.text_bytes + s.share_bytes);
  task.chunks = s.chunks;
  task.tiles = s.tiles;
  task.slots = s.slots;
  task.slot_offset = s.slot_offset;
  task.together = s.together;
  task.aligned = all_aligned(p);
  return task;
}

struct Spot {
  int32_t b, head;
  int32_t pair;  // b * H + head
  int32_t chunk;
};

IDCORE_DEVICE Spot spot_of(const Task& task, int tile) {
  Spot s;
  s.pair = tile / task.chunks;
  s.chunk = tile % task.chunks;
  s.b = s.pair / static_cast<int>(task.p.heads);
  s.head = s.pair % static_cast<int>(task.p.heads);
  return s;
}

// First tile of a block; the next block's first is one past its last.
IDCORE_DEVICE int first_tile(const Task& task, int block) {
  return static_cast<int>(static_cast<int64_t>(block) * task.tiles / grid_blocks());
}

// The row of a tensor that sample b reads: b * t.batch / batch, mostly without a division. Batches are below
// 2^16, so 32 bits hold the product.
IDCORE_DEVICE uint32_t batch_row(const HeadTensor& t, int64_t batch, uint32_t b) {
  if (t.batch == 1) return 0;
  if (t.batch == batch) return b;
  return b * static_cast<uint32_t>(t.batch) / static_cast<uint32_t>(batch);
}

IDCORE_DEVICE const uint16_t* head_of(const HeadTensor& t, int64_t batch, const Spot& s) {
  return static_cast<const uint16_t*>(t.data) + batch_row(t, batch, s.b) * t.stride_batch +
         s.head * t.stride_head;
}

// The stage of sample b in the bank of text keys and values, read when the kernel runs.
IDCORE_DEVICE int64_t stage_of(const StageBank& bank, int64_t b) {
  if (bank.index == nullptr) return 0;
  const int64_t i = bank.index[b * bank.stride];
  return i < 0 ? 0 : i >= bank.count ? bank.count - 1 : i;
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
