// Vectors of 4 floats by GCC's and Clang's vector extension: SSE2 on x86, NEON on ARM. Included by the base
// unit only.
#pragma once

#include <cstdint>
#include <cstring>

#define IDC_INLINE inline __attribute__((always_inline))
#define IDC_NOINLINE __attribute__((noinline))
// Keeps a value in its register without letting the compiler see through it.
#if defined(__x86_64__)
#define IDC_KEEP(a) asm volatile("" : "+x"(a))
#elif defined(__aarch64__)
#define IDC_KEEP(a) asm volatile("" : "+w"(a))
#else
#define IDC_KEEP(a) asm volatile("" : "+m"(a))
#endif

namespace idcore {
namespace cpu {
namespace {

typedef float V __attribute__((vector_size(16)));
typedef int32_t Bits __attribute__((vector_size(16)));
constexpr int kLanes = 4;
// Register blocking, 16 registers: keys x 2 vectors of rows for the scores, rows x N vectors for the values.
constexpr int kMaxKeys = 4;
constexpr int kMaxVectors = 2;
constexpr int kMaxRowsOf[kMaxVectors + 1] = {0, 8, 6};

IDC_INLINE V load(const float* p) {
  V a;
  std::memcpy(&a, p, sizeof(a));
  return a;
}
IDC_INLINE void store(float* p, V a) { std::memcpy(p, &a, sizeof(a)); }
IDC_INLINE V all(float x) { return V{x, x, x, x}; }
IDC_INLINE V zero() { return all(0.0f); }
IDC_INLINE V add(V a, V b) { return a + b; }
IDC_INLINE V sub(V a, V b) { return a - b; }
IDC_INLINE V mul(V a, V b) { return a * b; }
IDC_INLINE V div(V a, V b) { return a / b; }
// NaN in b wins, so that a NaN score reaches the result.
IDC_INLINE V larger(V a, V b) { return a > b ? a : b; }
IDC_INLINE V fma(V a, V b, V c) { return a * b + c; }

// 2^x for x <= about 0. Minimax polynomial of 2^f on [-0.5, 0.5], relative error 7.5e-8 before rounding.
IDC_INLINE V exp2(V x) {
  const V magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  x = larger(all(-126.0f), x);
  const V t = x + magic;
  const V f = x - (t - magic);
  V p = all(0.00132764725f);
  p = fma(p, f, all(0.00967554096f));
  p = fma(p, f, all(0.0555071309f));
  p = fma(p, f, all(0.240221202f));
  p = fma(p, f, all(0.693146944f));
  p = fma(p, f, all(1.00000012f));
  return reinterpret_cast<V>(reinterpret_cast<Bits>(p) + (reinterpret_cast<Bits>(t) << 23));
}

IDC_INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
IDC_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
IDC_INLINE float wide_fp16(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, magnitude = h & 0x7FFFu;
  if (magnitude >= 0x7C00u) return float_of(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  if (magnitude >= 0x400u) return float_of(sign | ((magnitude << 13) + (112u << 23)));
  const float tiny = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // subnormal: units of 2^-24
  return float_of(sign | bits_of(tiny));
}
IDC_INLINE uint16_t narrow_fp16(float x) {
  const uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  uint32_t h;
  if (magnitude > 0x7F800000u) {
    h = 0x7E00u;
  } else if (magnitude >= 0x477FF000u) {  // 65520 and more round to infinity
    h = 0x7C00u;
  } else if (magnitude >= 0x38800000u) {
    const uint32_t odd = (magnitude >> 13) & 1u;
    h = (magnitude - (112u << 23) + 0xFFFu + odd) >> 13;
  } else {  // subnormal: adding 0.5 leaves units of 2^-24 in the low bits, rounded to nearest even
    h = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  }
  return static_cast<uint16_t>(sign | h);
}
IDC_INLINE uint16_t narrow_bf16(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return static_cast<uint16_t>((bits | 0x400000u) >> 16);
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

// The first n of kLanes elements, the others 0.
IDC_INLINE V load_words(const float* p, int64_t n) {
  float part[kLanes] = {};
  for (int i = 0; i < kLanes && i < n; ++i) part[i] = p[i];
  return load(part);
}
IDC_INLINE V load_bf16(const uint16_t* p, int64_t n) {
  float part[kLanes] = {};
  for (int i = 0; i < kLanes && i < n; ++i) part[i] = float_of(static_cast<uint32_t>(p[i]) << 16);
  return load(part);
}
IDC_INLINE V load_fp16(const uint16_t* p, int64_t n) {
  float part[kLanes] = {};
  for (int i = 0; i < kLanes && i < n; ++i) part[i] = wide_fp16(p[i]);
  return load(part);
}
IDC_INLINE void store_fp32(float* p, V a, int64_t n) {
  for (int i = 0; i < kLanes && i < n; ++i) p[i] = a[i];
}
IDC_INLINE void store_fp16(uint16_t* p, V a, int64_t n) {
  for (int i = 0; i < kLanes && i < n; ++i) p[i] = narrow_fp16(a[i]);
}
IDC_INLINE void store_bf16(uint16_t* p, V a, int64_t n) {
  for (int i = 0; i < kLanes && i < n; ++i) p[i] = narrow_bf16(a[i]);
}

// Transposes a 4 x 4 tile.
IDC_INLINE void transpose(V (&r)[kLanes]) {
  V t[kLanes];
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; ++i) t[i] = V{r[0][i], r[1][i], r[2][i], r[3][i]};
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; ++i) r[i] = t[i];
}

}  // namespace
}  // namespace cpu
}  // namespace idcore
