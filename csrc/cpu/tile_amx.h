// The two products of the forward by AMX tiles, for bf16 calls whose head dim is a multiple of 32. Queries
// and probabilities stand as the dot-product path has them, [word][kRows]: that is the right operand of a
// tile product as it is. Keys and values are packed as left operands, with zeros up to whole tiles.
#pragma once

#include "cpu/tile_values.h"

namespace idcore {
namespace cpu {
namespace {

static_assert(kLanes == kTile && kRows == 2 * kTile, "a block of rows is two tiles wide");

struct Tiles {
  static constexpr bool kInTiles = true;

  // acc += probabilities times values: 16 channels by 16 rows, turned round.
  template <int R>
  static IDC_INLINE void accumulate(V (&acc)[R][1], const Block& block, const Place& at, int branch) {
    const int64_t words = whole_tiles(block.steps[branch]);
    const float* v = block.values[branch] + at.vector * kTile * words;
    const float* p = block.scores[branch] + at.row;
    tile_clear<0>();
    for (int64_t s = 0; s < words; s += kTile) {
      tile_left(v + s, words * 4);
      tile_right<0>(p + s * kRows, kRows * 4);
      tile_multiply<0>();
    }
    alignas(64) float part[kTile * kTile];
    tile_store<0>(part, kTile * 4);
    V rows[kTile];
#pragma GCC unroll 16
    for (int c = 0; c < kTile; ++c) rows[c] = load(part + c * kTile);
    transpose(rows);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) acc[r][0] = add(acc[r][0], rows[r]);
  }
};

template <>
IDC_NOINLINE void score_branch<Tiles, Ahead>(const float* q, const float* k, int64_t length, int64_t steps,
                                             Ahead& ahead, float* scores, float* top) {
  for (int64_t t = 0; t < length; t += kTile) {
    ahead.step();
    tile_clear<0>();
    tile_clear<1>();
    for (int64_t s = 0; s < steps; s += kTile) {
      tile_left(k + t * steps + s, steps * 4);
      tile_right<0>(q + s * kRows, kRows * 4);
      tile_right<1>(q + s * kRows + kTile, kRows * 4);
      tile_multiply<0>();
      tile_multiply<1>();
    }
    tile_store<0>(scores + t * kRows, kRows * 4);
    tile_store<1>(scores + t * kRows + kTile, kRows * 4);
  }
  V top0 = all(-__builtin_inff()), top1 = top0;
  for (int64_t t = 0; t < length; ++t) {
    top0 = larger(top0, load(scores + t * kRows));
    top1 = larger(top1, load(scores + t * kRows + kLanes));
  }
  store(top, top0);
  store(top + kLanes, top1);
}

}  // namespace
}  // namespace cpu
}  // namespace idcore
