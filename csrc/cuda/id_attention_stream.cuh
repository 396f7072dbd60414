// The stream of copies of one block: for each of its tiles the queries, the text's keys and values, then each
// identity's, always two blocks of keys ahead of the arithmetic, across tiles too.
#pragma once

#include "cuda/id_attention_task.cuh"
#include "cuda/id_attention_tile.cuh"

namespace idcore {
namespace cuda {

// Shared memory of a block: three stages of keys and values, a table of sums, then the slots. Of a slot, each
// warp owns its rows (q, then h, then the result, 16 bit) and its running result (float).
template <int kHeadDim>
struct Room {
  using G = Geometry<kHeadDim>;
  unsigned char* base;
  unsigned char* first_slot;
  int warps;

  IDCORE_DEVICE uint16_t* stage(int which) const {
    return reinterpret_cast<uint16_t*>(base) + which * G::kStageElements;
  }
  IDCORE_DEVICE float* table() const { return reinterpret_cast<float*>(stage(kStages)); }
  IDCORE_DEVICE uint16_t* rows(int slot) const {
    return reinterpret_cast<uint16_t*>(first_slot + slot * warps * G::kSlotBytes);
  }
  IDCORE_DEVICE float* aside(int slot, int warp) const {
    return reinterpret_cast<float*>(rows(slot) + warps * G::kRowElements) + warp * G::kSpareFloats;
  }
};

// Next of the stages, in turn.
IDCORE_DEVICE int after(int stage) { return stage + 1 == kStages ? 0 : stage + 1; }

// What is copied next, by this thread. Branch 0 is the text, branch j + 1 identity j.
struct Cursor {
  Place place;
  int tile, end;
  int branch;
  int left;  // keys of the branch
  int slot, stage;
  Spot spot;
  const uint16_t *k, *v;  // at the thread's place in the next rows
};

IDCORE_DEVICE int branch_length(const IdAttentionParams& p, int branch) {
  return static_cast<int>(branch == 0 ? p.lt : p.identity[branch - 1].length);
}

IDCORE_DEVICE const HeadTensor& keys_of(const IdAttentionParams& p, int branch) {
  return branch == 0 ? p.k_text : p.identity[branch - 1].k;
}
IDCORE_DEVICE const HeadTensor& values_of(const IdAttentionParams& p, int branch) {
  return branch == 0 ? p.v_text : p.identity[branch - 1].v;
}

// To the first row of a branch; false where the branch has none.
IDCORE_DEVICE bool open_branch(const IdAttentionParams& p, Cursor& c, int branch) {
  c.branch = branch;
  c.left = branch_length(p, branch);
  if (c.left == 0) return false;
  const HeadTensor &k = keys_of(p, branch), &v = values_of(p, branch);
  c.k = head_of(k, p.batch, c.spot) + c.place.row * k.stride_row + c.place.column;
  c.v = head_of(v, p.batch, c.spot) + c.place.row * v.stride_row + c.place.column;
  if (branch > 0 || p.stage.index == nullptr) return true;
  const int64_t stage = stage_of(p.stage, c.spot.b);
  c.k += stage * p.stage.k_stride;
  c.v += stage * p.stage.v_stride;
  return true;
}

template <int kHeadDim>
IDCORE_DEVICE Cursor start_of(const Task& task, int begin, int end) {
  Cursor c = {place_of<kHeadDim>(), begin, end, 0, 0, 0, 0, spot_of(task, begin), nullptr, nullptr};
  open_branch(task.p, c, 0);
  return c;
}

// Behind a branch's last key. kMany: a block may have several tiles; where it has one, the compiler keeps
// fewer numbers.
template <bool kMany>
IDCORE_DEVICE void next_branch(const Task& task, Cursor& c) {
  const IdAttentionParams& p = task.p;
  while (c.branch < p.num_identities)
    if (open_branch(p, c, c.branch + 1)) return;
  ++c.tile;
  if (!kMany || c.tile >= c.end) return;
  c.slot = c.slot + 1 == task.slots ? 0 : c.slot + 1;
  c.spot = spot_of(task, c.tile);
  open_branch(p, c, 0);
}

// Starts the copies of the next keys and values, and before a tile's first ones those of its queries.
template <int kHeadDim, bool kMany>
IDCORE_DEVICE void fetch(const Task& task, Cursor& c, const Room<kHeadDim>& room) {
  using G = Geometry<kHeadDim>;
  if (c.tile < c.end) {
    const IdAttentionParams& p = task.p;
    if (c.branch == 0 && c.left == static_cast<int>(p.lt)) {
      const int rows = room.warps * kWarpRows, first = c.spot.chunk * rows;
      const uint16_t* q =
          head_of(p.q, p.batch, c.spot) + (first + c.place.row) * p.q.stride_row + c.place.column;
      copy_rows<kHeadDim>(room.rows(c.slot), q, p.q.stride_row, static_cast<int>(p.lq) - first, rows, c.place,
                          task.aligned);
    }
    const int64_t k_stride = keys_of(p, c.branch).stride_row, v_stride = values_of(p, c.branch).stride_row;
    copy_stage<kHeadDim>(room.stage(c.stage), c.k, c.v, k_stride, v_stride, c.left, c.place, task.aligned);
    c.k += G::kKeys * k_stride;
    c.v += G::kKeys * v_stride;
    c.left -= G::kKeys;
    if (c.left <= 0) next_branch<kMany>(task, c);
    c.stage = after(c.stage);
  }
  commit_copies();
}

}  // namespace cuda
}  // namespace idcore
