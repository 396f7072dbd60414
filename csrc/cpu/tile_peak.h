// The instruction set's multiply-add rate, as a yardstick.
#pragma once

#include "cpu/tile_scores.h"

namespace idcore {
namespace cpu {
namespace {

template <class Dot>
IDC_NOINLINE double multiply_adds_of(int64_t rounds, int per_lane) {
  constexpr int kChains = kMaxKeys * 2;
  V acc[kChains];
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) acc[i] = all(static_cast<float>(i));
  V x = all(0.5f), y = all(0.25f);
  for (int64_t n = 0; n < rounds; ++n) {
#pragma GCC unroll 32
    for (int i = 0; i < kChains; ++i) {
      acc[i] = Dot::multiply_add(x, y, acc[i]);
      IDC_KEEP(acc[i]);
    }
  }
#pragma GCC unroll 32
  for (int i = 1; i < kChains; ++i) acc[0] = add(acc[0], acc[i]);
  float sink[kLanes];
  store(sink, acc[0]);
  const double flops = 2.0 * per_lane * kChains * kLanes * static_cast<double>(rounds);
  return sink[0] == -1.0f ? 0.0 : flops;  // the sums must count for something, or they would be left out
}

double multiply_adds(int64_t rounds, bool pairs) {
#if defined(IDC_PAIRS)
  if (pairs) return multiply_adds_of<Pairs>(rounds, 2);
#endif
  (void)pairs;
  return multiply_adds_of<Float32>(rounds, 1);
}

}  // namespace
}  // namespace cpu
}  // namespace idcore
