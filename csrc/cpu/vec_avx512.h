// Vectors of 16 floats. Included once by each AVX-512 unit; everything is local to that unit.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define IDC_INLINE inline __attribute__((always_inline))
#define IDC_NOINLINE __attribute__((noinline))
// Keeps a value in its register without letting the compiler see through it.
#define IDC_KEEP(a) asm volatile("" : "+v"(a))

namespace idcore {
namespace cpu {
namespace {

using V = __m512;
constexpr int kLanes = 16;
// Register blocking, 32 registers: keys x 2 vectors of rows for the scores, rows x N vectors for the values.
constexpr int kMaxKeys = 14;
constexpr int kMaxVectors = 4;
constexpr int kMaxRowsOf[kMaxVectors + 1] = {0, 16, 12, 8, 6};

IDC_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
IDC_INLINE void store(float* p, V a) { _mm512_storeu_ps(p, a); }
IDC_INLINE V zero() { return _mm512_setzero_ps(); }
IDC_INLINE V all(float x) { return _mm512_set1_ps(x); }
IDC_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
IDC_INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
IDC_INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
IDC_INLINE V div(V a, V b) { return _mm512_div_ps(a, b); }
// NaN in b wins, so that a NaN score reaches the result.
IDC_INLINE V larger(V a, V b) { return _mm512_max_ps(a, b); }
IDC_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }

// 2^x for x <= about 0. Minimax polynomial of 2^f on [0, 1), relative error 7.5e-8 before rounding.
IDC_INLINE V exp2(V x) {
  const V f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
  V p = all(0.00187757669f);
  p = fma(p, f, all(0.00898933969f));
  p = fma(p, f, all(0.0558263175f));
  p = fma(p, f, all(0.240153611f));
  p = fma(p, f, all(0.693153083f));
  p = fma(p, f, all(0.99999994f));
  return _mm512_scalef_ps(p, x);
}

IDC_INLINE __mmask16 first(int64_t n) {
  return n >= kLanes ? static_cast<__mmask16>(0xFFFF) : static_cast<__mmask16>((1u << n) - 1u);
}

// The first n of kLanes elements, the others 0.
IDC_INLINE V load_words(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
IDC_INLINE __m256i load_half(const uint16_t* p, int64_t n) { return _mm256_maskz_loadu_epi16(first(n), p); }
IDC_INLINE V widen_bf16(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
IDC_INLINE V load_bf16(const uint16_t* p, int64_t n) { return widen_bf16(load_half(p, n)); }
IDC_INLINE V load_fp16(const uint16_t* p, int64_t n) { return _mm512_cvtph_ps(load_half(p, n)); }

// Words with elements of `a` in the low and of `b` in the high 16 bits; zeros behind in_a and in_b elements.
IDC_INLINE V load_pairs(const uint16_t* a, int64_t in_a, const uint16_t* b, int64_t in_b) {
  const __m512i lo = _mm512_cvtepu16_epi32(load_half(a, in_a));
  const __m512i hi = _mm512_slli_epi32(_mm512_cvtepu16_epi32(load_half(b, in_b)), 16);
  return _mm512_castsi512_ps(_mm512_or_si512(lo, hi));
}

IDC_INLINE void store_fp32(float* p, V a, int64_t n) { _mm512_mask_storeu_ps(p, first(n), a); }
IDC_INLINE void store_fp16(uint16_t* p, V a, int64_t n) {
  const int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(a, mode));
}
#if defined(IDC_PAIRS)
IDC_INLINE void store_bf16(uint16_t* p, V a, int64_t n) {
  _mm256_mask_storeu_epi16(p, first(n), (__m256i)_mm512_cvtneps_pbh(a));
}
#else
IDC_INLINE void store_bf16(uint16_t* p, V a, int64_t n) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  const __m512i keep = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i top = _mm512_srli_epi32(_mm512_mask_mov_epi32(up, nan, keep), 16);
  _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtepi32_epi16(top));
}
#endif

// Transposes a 16 x 16 tile held in registers.
IDC_INLINE void transpose(V (&r)[kLanes]) {
  V t[kLanes], u[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]);
    const __m512d c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
    u[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    u[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    u[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    u[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    const V a = _mm512_shuffle_f32x4(u[i], u[4 + i], 0x88), b = _mm512_shuffle_f32x4(u[i], u[4 + i], 0xDD);
    const V c = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0x88),
            d = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0xDD);
    r[i] = _mm512_shuffle_f32x4(a, c, 0x88);
    r[8 + i] = _mm512_shuffle_f32x4(a, c, 0xDD);
    r[4 + i] = _mm512_shuffle_f32x4(b, d, 0x88);
    r[12 + i] = _mm512_shuffle_f32x4(b, d, 0xDD);
  }
}

}  // namespace
}  // namespace cpu
}  // namespace idcore
