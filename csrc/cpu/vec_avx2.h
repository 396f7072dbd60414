// Vectors of 8 floats with FMA and F16C. Included by the AVX2 unit only.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define IDC_INLINE inline __attribute__((always_inline))
#define IDC_NOINLINE __attribute__((noinline))
// Keeps a value in its register without letting the compiler see through it.
#define IDC_KEEP(a) asm volatile("" : "+x"(a))

namespace idcore {
namespace cpu {
namespace {

using V = __m256;
constexpr int kLanes = 8;
// Register blocking, 16 registers: keys x 2 vectors of rows for the scores, rows x N vectors for the values.
constexpr int kMaxKeys = 6;
constexpr int kMaxVectors = 2;
constexpr int kMaxRowsOf[kMaxVectors + 1] = {0, 8, 6};

IDC_INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
IDC_INLINE void store(float* p, V a) { _mm256_storeu_ps(p, a); }
IDC_INLINE V zero() { return _mm256_setzero_ps(); }
IDC_INLINE V all(float x) { return _mm256_set1_ps(x); }
IDC_INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
IDC_INLINE V sub(V a, V b) { return _mm256_sub_ps(a, b); }
IDC_INLINE V mul(V a, V b) { return _mm256_mul_ps(a, b); }
IDC_INLINE V div(V a, V b) { return _mm256_div_ps(a, b); }
// NaN in b wins, so that a NaN score reaches the result.
IDC_INLINE V larger(V a, V b) { return _mm256_max_ps(a, b); }
IDC_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }

// 2^x for x <= about 0. Minimax polynomial of 2^f on [-0.5, 0.5], relative error 7.5e-8 before rounding.
IDC_INLINE V exp2(V x) {
  const V magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  x = larger(all(-126.0f), x);
  const V t = add(x, magic);
  const V f = sub(x, sub(t, magic));
  V p = all(0.00132764725f);
  p = fma(p, f, all(0.00967554096f));
  p = fma(p, f, all(0.0555071309f));
  p = fma(p, f, all(0.240221202f));
  p = fma(p, f, all(0.693146944f));
  p = fma(p, f, all(1.00000012f));
  return _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(t), 23)));
}

// The first n of kLanes elements, the others 0.
IDC_INLINE V load_words(const float* p, int64_t n) {
  if (n >= kLanes) return load(p);
  float part[kLanes] = {};
  std::memcpy(part, p, static_cast<size_t>(n) * sizeof(float));
  return load(part);
}
IDC_INLINE __m128i load_half(const uint16_t* p, int64_t n) {
  if (n >= kLanes) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  uint16_t part[kLanes] = {};
  std::memcpy(part, p, static_cast<size_t>(n) * sizeof(uint16_t));
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(part));
}
IDC_INLINE V load_bf16(const uint16_t* p, int64_t n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(p, n)), 16));
}
IDC_INLINE V load_fp16(const uint16_t* p, int64_t n) { return _mm256_cvtph_ps(load_half(p, n)); }

IDC_INLINE void store_fp32(float* p, V a, int64_t n) {
  if (n >= kLanes) return store(p, a);
  float part[kLanes];
  store(part, a);
  std::memcpy(p, part, static_cast<size_t>(n) * sizeof(float));
}
IDC_INLINE void store_half(uint16_t* p, __m128i a, int64_t n) {
  if (n >= kLanes) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), a);
  uint16_t part[kLanes];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(part), a);
  std::memcpy(p, part, static_cast<size_t>(n) * sizeof(uint16_t));
}
IDC_INLINE void store_fp16(uint16_t* p, V a, int64_t n) {
  store_half(p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), n);
}
IDC_INLINE void store_bf16(uint16_t* p, V a, int64_t n) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const __m256i keep = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i top = _mm256_srli_epi32(_mm256_blendv_epi8(up, keep, nan), 16);
  store_half(p, _mm_packus_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1)), n);
}

// Transposes an 8 x 8 tile held in registers.
IDC_INLINE void transpose(V (&r)[kLanes]) {
  V t[kLanes], u[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 2; ++i) {
    u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xEE);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xEE);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(u[i], u[4 + i], 0x20);
    r[4 + i] = _mm256_permute2f128_ps(u[i], u[4 + i], 0x31);
  }
}

}  // namespace
}  // namespace cpu
}  // namespace idcore
