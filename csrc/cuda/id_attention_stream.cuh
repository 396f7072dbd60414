// The stream of copies of one block: for each of its tiles the queries, the text's keys and values, then each
// identity's, always one block of keys ahead of the arithmetic, across tiles too.
#pragma once

#include "cuda/id_attention_task.cuh"
#include "cuda/id_attention_tile.cuh"

namespace idcore {
namespace cuda {

// Shared memory of a block: two stages of keys and values, a table of sums, then the slots. Of a slot, each
// warp owns its rows (q, then h, then the result, 16 bit) and its running result (float).
template <int kHeadDim>
struct Room {
  using G = Geometry<kHeadDim>;
  unsigned char* base;
  unsigned char* first_slot;
  int warps;

  IDCORE_DEVICE uint16_t* stage(int step) const {
    return reinterpret_cast<uint16_t*>(base) + step % 2 * G::kStageElements;
  }
  IDCORE_DEVICE float* table() const { return reinterpret_cast<float*>(base + 4 * G::kStageElements); }
  IDCORE_DEVICE uint16_t* rows(int slot) const {
    return reinterpret_cast<uint16_t*>(first_slot + slot * warps * G::kSlotBytes);
  }
  IDCORE_DEVICE float* aside(int slot, int warp) const {
    return reinterpret_cast<float*>(rows(slot) + warps * G::kRowElements) + warp * G::kSpareFloats;
  }
};

// What is copied next. Branch 0 is the text, branch j + 1 identity j.
struct Cursor {
  int tile, end;
  int branch;
  int first;  // key
  int slot;
  Spot spot;
};

IDCORE_DEVICE int branch_length(const IdAttentionParams& p, int branch) {
  return static_cast<int>(branch == 0 ? p.lt : p.identity[branch - 1].length);
}

// kMany: a block may have several tiles; where it has one, the compiler keeps fewer numbers.
template <bool kMany>
IDCORE_DEVICE void advance(const Task& task, Cursor& c, int keys) {
  const IdAttentionParams& p = task.p;
  c.first += keys;
  while (c.branch <= p.num_identities && c.first >= branch_length(p, c.branch)) {
    ++c.branch;
    c.first = 0;
  }
  if (c.branch <= p.num_identities) return;
  c.branch = 0;
  if (!kMany) {
    c.tile = c.end;
    return;
  }
  c.slot = c.slot + 1 == task.slots ? 0 : c.slot + 1;
  if (++c.tile < c.end) c.spot = spot_of(task, c.tile);
}

template <int kHeadDim, bool kMany>
IDCORE_DEVICE void fetch(const Task& task, Cursor& c, const Room<kHeadDim>& room, int step) {
  using G = Geometry<kHeadDim>;
  if (c.tile < c.end) {
    const IdAttentionParams& p = task.p;
    const int64_t b = c.spot.b, head = c.spot.head;
    const int tile_rows = room.warps * kWarpRows;
    if (c.branch == 0 && c.first == 0)
      load_rows<kHeadDim>(room.rows(c.slot), head_of(p.q, p.batch, b, head), p.q.stride_row,
                          c.spot.chunk * tile_rows, static_cast<int>(p.lq), tile_rows, task.aligned);
    const HeadTensor& k = c.branch == 0 ? p.k_text : p.identity[c.branch - 1].k;
    const HeadTensor& v = c.branch == 0 ? p.v_text : p.identity[c.branch - 1].v;
    const int64_t bank = c.branch == 0 ? stage_of(p.stage, b) : 0;
    const int count = branch_length(p, c.branch);
    load_rows<kHeadDim>(room.stage(step), head_of(k, p.batch, b, head) + bank * p.stage.k_stride,
                        k.stride_row, c.first, count, G::kKeys, task.aligned);
    load_rows<kHeadDim>(room.stage(step) + G::kKeys * G::kPitch,
                        head_of(v, p.batch, b, head) + bank * p.stage.v_stride, v.stride_row, c.first, count,
                        G::kKeys, task.aligned);
    advance<kMany>(task, c, G::kKeys);
  }
  commit_copies();
}

}  // namespace cuda
}  // namespace idcore
