// The unit's table: the last header that an ISA unit includes.
#pragma once

#include "cpu/align_face_sample.h"
#include "cpu/tile_finish.h"
#include "cpu/tile_losses.h"
#include "cpu/tile_sum.h"

namespace idcore {
namespace cpu {
namespace {

constexpr BackwardKernels kBackward = backward_table();

constexpr Kernels table(const char* name, bool has_pairs) {
  return Kernels{name,   kLanes, has_pairs, packed_k_words, packed_v_words, row_floats, pack_k,
                 pack_v, attend, finish,    multiply_adds,  &kBackward,     chip_tile,  sum_rows};
}

}  // namespace
}  // namespace cpu
}  // namespace idcore
