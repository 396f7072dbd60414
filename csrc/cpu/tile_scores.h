// Scores of a block of rows against all keys, and their softmax. One image row per lane: sums over keys need
// no work across lanes, and no key is padded. Scores stand as [key][kRows].
#pragma once

#include <cstring>

#include "cpu/tile_ahead.h"

namespace idcore {
namespace cpu {
namespace {

struct Float32 {
  static constexpr bool kInTiles = false;
  static constexpr int kPerStep = 1;  // elements that one word of an operand holds
  static IDC_INLINE V multiply_add(V a, V b, V c) { return fma(a, b, c); }
};

// Steps that are summed in sequence: the error of such a sum grows with its length.
constexpr int64_t kScoreSteps = 64;

template <class Dot, int N>
IDC_NOINLINE void score_tile(const float* q, const float* k, int64_t steps, float* scores, float* top) {
  V acc[N][2];
  for (int64_t from = 0; from < steps; from += kScoreSteps) {
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) acc[j][0] = acc[j][1] = zero();
    const int64_t last = smaller(steps, from + kScoreSteps);
    for (int64_t s = from; s < last; ++s, q += kRows, k += N) {
      const V q0 = load(q), q1 = load(q + kLanes);
#pragma GCC unroll 16
      for (int j = 0; j < N; ++j) {
        const V x = all(k[j]);
        acc[j][0] = Dot::multiply_add(x, q0, acc[j][0]);
        acc[j][1] = Dot::multiply_add(x, q1, acc[j][1]);
      }
    }
    if (steps <= kScoreSteps) break;
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) {
      if (from > 0) {
        acc[j][0] = add(acc[j][0], load(scores + j * kRows));
        acc[j][1] = add(acc[j][1], load(scores + j * kRows + kLanes));
      }
      store(scores + j * kRows, acc[j][0]);
      store(scores + j * kRows + kLanes, acc[j][1]);
    }
  }
  V top0 = load(top), top1 = load(top + kLanes);
#pragma GCC unroll 16
  for (int j = 0; j < N; ++j) {
    store(scores + j * kRows, acc[j][0]);
    store(scores + j * kRows + kLanes, acc[j][1]);
    top0 = larger(top0, acc[j][0]);
    top1 = larger(top1, acc[j][1]);
  }
  store(top, top0);
  store(top + kLanes, top1);
}

template <class Dot, int N = kMaxKeys>
IDC_INLINE void score_group(int64_t n, const float* q, const float* k, int64_t steps, float* scores,
                            float* top) {
  if (n == N) return score_tile<Dot, N>(q, k, steps, scores, top);
  if constexpr (N > 1) score_group<Dot, N - 1>(n, q, k, steps, scores, top);
}

// q k^T without any scale, and each row's largest score.
template <class Dot, class Coming>
void score_branch(const float* q, const float* k, int64_t length, int64_t steps, Coming& ahead, float* scores,
                  float* top) {
  store(top, all(-__builtin_inff()));
  store(top + kLanes, all(-__builtin_inff()));
  const Groups groups(length, kMaxKeys);
  for (int64_t g = 0; g < groups.count; ++g) {
    const int64_t at = groups.offset(g);
    ahead.step();
    score_group<Dot>(groups.size(g), q, k + at * steps, steps, scores + at * kRows, top);
  }
}

IDC_INLINE float bias_at(const TextBias& bias, int64_t element) {
  if (bias.dtype == DType::kFloat32) return static_cast<const float*>(bias.data)[element];
  const uint16_t* p = static_cast<const uint16_t*>(bias.data) + element;
  float lanes[kLanes];
  store(lanes, bias.dtype == DType::kBFloat16 ? load_bf16(p, 1) : load_fp16(p, 1));
  return lanes[0];
}

// scores = scores * scale + bias, in units of log2; then each row's largest. `element`: the bias of the first
// row.
IDC_NOINLINE void add_bias(const TextBias& bias, int64_t element, int64_t valid, int64_t length, float scale,
                           float* scores, float* top) {
  constexpr float kLog2e = 1.44269504f;
  V top0 = all(-__builtin_inff()), top1 = top0;
  float row_bias[kRows];
  for (int64_t t = 0; t < length; ++t, scores += kRows) {
    const int64_t at = element + t * bias.stride_token;
    if (bias.stride_row == 0) {
      const V same = all(bias_at(bias, at) * kLog2e);
      store(row_bias, same);
      store(row_bias + kLanes, same);
    } else {
      for (int64_t r = 0; r < kRows; ++r) {
        row_bias[r] = bias_at(bias, at + smaller(r, valid - 1) * bias.stride_row) * kLog2e;
      }
    }
    const V s0 = fma(load(scores), all(scale), load(row_bias));
    const V s1 = fma(load(scores + kLanes), all(scale), load(row_bias + kLanes));
    store(scores, s0);
    store(scores + kLanes, s1);
    top0 = larger(top0, s0);
    top1 = larger(top1, s1);
  }
  store(top, top0);
  store(top + kLanes, top1);
}

struct SumOfTwo {
  V a = zero(), b = zero();
};

// Probabilities before the division: scores = 2^(scale (scores - top)), and each row's sum over the keys.
IDC_NOINLINE SumOfTwo exponentials(float* scores, int64_t length, float scale, const float* top) {
  const V c = all(scale), top0 = mul(load(top), all(-scale)), top1 = mul(load(top + kLanes), all(-scale));
  SumOfTwo sum;
  for (int64_t t = 0; t < length; ++t, scores += kRows) {
    const V p0 = exp2(fma(load(scores), c, top0)), p1 = exp2(fma(load(scores + kLanes), c, top1));
    store(scores, p0);
    store(scores + kLanes, p1);
    sum.a = add(sum.a, p0);
    sum.b = add(sum.b, p1);
  }
  return sum;
}

// log2 x for x >= 1: the bits of x, read as a number, are a first guess y; then the series of log(x / 2^y).
IDC_INLINE V log2(V x) {
  float lanes[kLanes];
  int32_t bits[kLanes];
  store(lanes, x);
  std::memcpy(bits, lanes, sizeof(bits));
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(bits[i] - 0x3F800000) * 0x1p-23f;
  const V y = load(lanes);
  const V z = fma(x, exp2(sub(zero(), y)), all(-1.0f));  // at most 0.062 in magnitude
  V p = all(-0.1666666667f);
  p = fma(p, z, all(0.2f));
  p = fma(p, z, all(-0.25f));
  p = fma(p, z, all(0.3333333333f));
  p = fma(p, z, all(-0.5f));
  p = fma(p, z, all(1.0f));
  return fma(mul(p, z), all(1.44269504f), y);
}

// Row statistics for backward: log2 of a softmax's denominator, 2^(scale top) taken out of `sum`.
IDC_NOINLINE void store_lse(float* out, const SumOfTwo& sum, float scale, const float* top, int64_t valid) {
  store_fp32(out, fma(load(top), all(scale), log2(sum.a)), smaller(valid, kLanes));
  if (valid > kLanes)
    store_fp32(out + kLanes, fma(load(top + kLanes), all(scale), log2(sum.b)), valid - kLanes);
}

// p^(2^squarings). The unscaled softmax is the normalised power sqrt(D) of the scaled one: D = 64 needs p^8.
IDC_INLINE V power(V p, int squarings) {
  for (int i = 0; i < squarings; ++i) p = mul(p, p);
  return p;
}

struct ShareOptions {
  int64_t head_dim;
  int64_t num_zero;
  int64_t num_global;
  float* lse;     // of the unscaled scores, for backward; null: not wanted
  int64_t valid;  // rows that are written there
};

// As `exponentials`, and in `share` what the first num_global tokens (then zero tokens) get of the softmax of
// the unscaled scores; zero tokens stand in its denominator.
template <int kSquarings>
IDC_NOINLINE SumOfTwo exponentials_and_share(float* scores, int64_t length, float scale, const float* top,
                                             const ShareOptions& o, float* share) {
  constexpr float kLog2e = 1.44269504f;
  const V c = all(scale), top0 = mul(load(top), all(-scale)), top1 = mul(load(top + kLanes), all(-scale));
  const V raw = all(kLog2e), raw0 = mul(load(top), all(-kLog2e)),
          raw1 = mul(load(top + kLanes), all(-kLog2e));
  SumOfTwo sum, sharp, counted;
  for (int64_t t = 0; t < length; ++t, scores += kRows) {
    const V s0 = load(scores), s1 = load(scores + kLanes);
    const V p0 = exp2(fma(s0, c, top0)), p1 = exp2(fma(s1, c, top1));
    store(scores, p0);
    store(scores + kLanes, p1);
    sum.a = add(sum.a, p0);
    sum.b = add(sum.b, p1);
    const V x0 = kSquarings >= 0 ? power(p0, kSquarings) : exp2(fma(s0, raw, raw0));
    const V x1 = kSquarings >= 0 ? power(p1, kSquarings) : exp2(fma(s1, raw, raw1));
    sharp.a = add(sharp.a, x0);
    sharp.b = add(sharp.b, x1);
    if (t < o.num_global) counted = sharp;
  }
  const V zero0 = exp2(raw0), zero1 = exp2(raw1);
  const int64_t spare = o.num_global > length ? o.num_global - length : 0;
  const V some = all(static_cast<float>(smaller(spare, o.num_zero))),
          every = all(static_cast<float>(o.num_zero));
  if (o.num_zero > 0) {  // else top may be far below 0 and 2^-top infinite
    counted.a = fma(some, zero0, counted.a);
    counted.b = fma(some, zero1, counted.b);
    sharp.a = fma(every, zero0, sharp.a);
    sharp.b = fma(every, zero1, sharp.b);
  }
  store(share, div(counted.a, sharp.a));
  store(share + kLanes, div(counted.b, sharp.b));
  if (o.lse != nullptr) store_lse(o.lse, sharp, kLog2e, top, o.valid);
  return sum;
}

// Softmax of an identity's scores; the denominator holds num_zero logits of 0. `share` null: not wanted.
IDC_INLINE SumOfTwo identity_softmax(float* scores, int64_t length, float scale, float* top,
                                     const ShareOptions& o, float* share) {
  if (o.num_zero > 0) {
    store(top, larger(load(top), zero()));
    store(top + kLanes, larger(load(top + kLanes), zero()));
  }
  SumOfTwo sum;
  if (share == nullptr) {
    sum = exponentials(scores, length, scale, top);
  } else if (o.head_dim == 64) {
    sum = exponentials_and_share<3>(scores, length, scale, top, o, share);
  } else if (o.head_dim == 256) {
    sum = exponentials_and_share<4>(scores, length, scale, top, o, share);
  } else if (o.head_dim == 16) {
    sum = exponentials_and_share<2>(scores, length, scale, top, o, share);
  } else {
    sum = exponentials_and_share<-1>(scores, length, scale, top, o, share);
  }
  if (o.num_zero > 0) {
    const V n = all(static_cast<float>(o.num_zero));
    sum.a = fma(n, exp2(mul(load(top), all(-scale))), sum.a);
    sum.b = fma(n, exp2(mul(load(top + kLanes), all(-scale))), sum.b);
  }
  return sum;
}

}  // namespace
}  // namespace cpu
}  // namespace idcore
