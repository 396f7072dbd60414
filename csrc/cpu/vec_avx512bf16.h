// What AVX512_BF16 adds: products of bf16 pairs, summed in float32. After vec_avx512.h.
#pragma once

#include <immintrin.h>

namespace idcore {
namespace cpu {
namespace {

struct Pairs {
  static constexpr bool kInTiles = false;
  static constexpr int kPerStep = 2;
  static IDC_INLINE V multiply_add(V a, V b, V c) {
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
  }
};

// Words with two neighbours of `a`, then of `b`, rounded to nearest even.
IDC_INLINE V narrow_neighbours(V a, V b) { return _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(b, a)); }

// Words with `a` in the low and `b` in the high 16 bits, rounded to nearest even.
IDC_INLINE V narrow_pairs(V a, V b) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b, a);  // 16 x a, then 16 x b
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                         22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, both));
}

}  // namespace
}  // namespace cpu
}  // namespace idcore
