// Asking for memory before it is needed. Rows of one head lie a whole [H, D] row apart, which the hardware
// does not foresee. So each group of keys asks for a few rows of what comes next while it computes.
#pragma once

#include "cpu/tile_pack.h"

namespace idcore {
namespace cpu {
namespace {

// `rows` pieces of `bytes` each.
struct Stream {
  const char* start;
  int64_t stride, bytes, rows, done;

  template <int kWrite>
  IDC_INLINE void step(int64_t count) {
    for (const int64_t end = smaller(done + count, rows); done < end; ++done) {
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(start + done * stride + at, kWrite, 3);
    }
  }
};

struct Ahead {
  Stream queries;       // of the next block
  Stream result;        // rows that this block writes
  Stream text;          // h of this block, which waits for the second pass
  int64_t rows_a_step;  // so that all is asked for within the groups of keys of a block

  IDC_INLINE void step() {
    queries.step<0>(rows_a_step);
    result.step<1>(rows_a_step);
    text.step<1>(rows_a_step);
  }
};

}  // namespace
}  // namespace cpu
}  // namespace idcore
