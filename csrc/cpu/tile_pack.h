// Repacks K, V and blocks of queries into the order in which the inner loops read them. After a vec_*.h.
#pragma once

#include "cpu/kernels.h"

namespace idcore {
namespace cpu {
namespace {

constexpr int kRows = 2 * kLanes;  // image rows of one block: two vectors, one row per lane

// n items in as few groups as `most` allows, as even as possible: the larger groups come first.
struct Groups {
  int64_t count, small, larger_ones;
  IDC_INLINE Groups(int64_t n, int64_t most)
      : count((n + most - 1) / most), small(count ? n / count : 0), larger_ones(count ? n % count : 0) {}
  IDC_INLINE int64_t size(int64_t i) const { return small + (i < larger_ones ? 1 : 0); }
  IDC_INLINE int64_t offset(int64_t i) const { return i * small + (i < larger_ones ? i : larger_ones); }
};

IDC_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
IDC_INLINE int64_t padded(int64_t head_dim) { return ceil_div(head_dim, kLanes) * kLanes; }
IDC_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// How elements reach the 32-bit words that the inner loops multiply. Words: two bf16 elements, unchanged.
enum class Form { kFloat32, kBFloat16, kFloat16, kWords };

IDC_INLINE Form form_of(DType t, bool pairs) {
  if (pairs) return Form::kWords;
  return t == DType::kFloat32 ? Form::kFloat32 : t == DType::kBFloat16 ? Form::kBFloat16 : Form::kFloat16;
}
IDC_INLINE Form form_of(const Plan& plan) { return form_of(plan.params->dtype, plan.pairs); }
IDC_INLINE int64_t element_bytes(DType t) { return t == DType::kFloat32 ? 4 : 2; }

template <Form F>
IDC_INLINE V load_form(const char* row, int64_t word, int64_t n) {
  if constexpr (F == Form::kFloat32 || F == Form::kWords) {
    return load_words(reinterpret_cast<const float*>(row) + word, n);
  } else if constexpr (F == Form::kBFloat16) {
    return load_bf16(reinterpret_cast<const uint16_t*>(row) + word, n);
  } else {
    return load_fp16(reinterpret_cast<const uint16_t*>(row) + word, n);
  }
}

template <Form F, bool kFull>
IDC_NOINLINE void transpose_some_rows(const char* base, int64_t row_bytes, int64_t valid, int64_t words,
                                      float* out, int64_t ld) {
  for (int64_t w = 0; w < words; w += kLanes) {
    const int64_t n = smaller(words - w, kLanes);
    V r[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      r[i] = kFull || i < valid ? load_form<F>(base + i * row_bytes, w, n) : zero();
    transpose(r);
    if (n == kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(out + (w + i) * ld, r[i]);
    } else {
      alignas(64) float part[kLanes * kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(part + i * kLanes, r[i]);
      for (int64_t i = 0; i < n; ++i) store(out + (w + i) * ld, load(part + i * kLanes));
    }
  }
}

// kLanes rows x `words` to out[word * ld + row]. Rows from `valid` on are zeros and not read. Each store
// writes a whole vector, so rows of `out` must be filled in increasing order or be kLanes wide.
template <Form F>
IDC_INLINE void transpose_rows(const char* base, int64_t row_bytes, int64_t valid, int64_t words, float* out,
                               int64_t ld) {
  if (valid >= kLanes) return transpose_some_rows<F, true>(base, row_bytes, valid, words, out, ld);
  transpose_some_rows<F, false>(base, row_bytes, valid, words, out, ld);
}

IDC_INLINE void transpose_rows(Form form, const char* base, int64_t row_bytes, int64_t valid, int64_t words,
                               float* out, int64_t ld) {
  switch (form) {
    case Form::kFloat32:
      return transpose_rows<Form::kFloat32>(base, row_bytes, valid, words, out, ld);
    case Form::kBFloat16:
      return transpose_rows<Form::kBFloat16>(base, row_bytes, valid, words, out, ld);
    case Form::kFloat16:
      return transpose_rows<Form::kFloat16>(base, row_bytes, valid, words, out, ld);
    case Form::kWords:
      return transpose_rows<Form::kWords>(base, row_bytes, valid, words, out, ld);
  }
}

// Multiply-accumulate steps of one score: elements, or pairs of them.
IDC_INLINE int64_t score_steps(const Plan& plan) {
  return plan.pairs ? plan.params->head_dim / 2 : plan.params->head_dim;
}
IDC_INLINE int64_t value_steps(const Plan& plan, int64_t length) {
  return plan.pairs ? ceil_div(length, 2) : length;
}

// Whether the products of a call go through AMX tiles, whose operands are packed in whole tiles.
IDC_INLINE bool in_tiles(int64_t head_dim, bool pairs) {
#if defined(IDC_TILES)
  return pairs && head_dim % (2 * kTile) == 0;
#else
  (void)head_dim, (void)pairs;
  return false;
#endif
}
// Rows of scores that a branch takes: its keys, or whole tiles of them.
IDC_INLINE int64_t score_rows(int64_t length) {
#if defined(IDC_TILES)
  return whole_tiles(length);
#else
  return length;
#endif
}

int64_t packed_k_words(int64_t length, int64_t head_dim, bool pairs) {
#if defined(IDC_TILES)
  if (in_tiles(head_dim, pairs)) return whole_tiles(length) * head_dim / 2;
#endif
  return length * (pairs ? head_dim / 2 : head_dim) + kLanes;  // slack: vector stores run over
}
int64_t packed_v_words(int64_t length, int64_t head_dim, bool pairs) {
#if defined(IDC_TILES)
  if (in_tiles(head_dim, pairs)) return whole_tiles(ceil_div(length, 2)) * head_dim;
#endif
  return (pairs ? ceil_div(length, 2) : length) * padded(head_dim);
}

IDC_INLINE int64_t length_of(const Plan& plan, int branch) {
  return branch == 0 ? plan.params->lt : plan.params->identity[branch - 1].length;
}
IDC_INLINE const char* head_start(const HeadTensor& t, int64_t bytes, int64_t batch, int64_t head) {
  return static_cast<const char*>(t.data) + (batch * t.stride_batch + head * t.stride_head) * bytes;
}

#if defined(IDC_TILES)
// [key][word], keys of zeros up to whole tiles.
void pack_k_tiles(const Plan& plan, const char* rows, int64_t row_bytes, int64_t length, float* out) {
  const int64_t words = plan.params->head_dim / 2;
  for (int64_t t = 0; t < whole_tiles(length); ++t) {
    const float* row = reinterpret_cast<const float*>(rows + t * row_bytes);
    for (int64_t w = 0; w < words; w += kLanes, out += kLanes)
      store(out, t < length ? load(row + w) : zero());
  }
}
#endif

// Groups of at most kMaxKeys keys, each [step][key].
void pack_k(const Plan& plan, const char* rows, int64_t row_bytes, int64_t length, float* out) {
#if defined(IDC_TILES)
  if (in_tiles(plan.params->head_dim, plan.pairs)) return pack_k_tiles(plan, rows, row_bytes, length, out);
#endif
  const int64_t steps = score_steps(plan);
  const Groups groups(length, kMaxKeys);
  const Form form = form_of(plan);
  for (int64_t g = 0; g < groups.count; ++g) {
    const char* start = rows + groups.offset(g) * row_bytes;
    transpose_rows(form, start, row_bytes, groups.size(g), steps, out + groups.offset(g) * steps,
                   groups.size(g));
  }
}

template <Form F>
IDC_INLINE V load_value(const char* rows, int64_t row_bytes, int64_t step, int64_t length, int64_t d,
                        int64_t n) {
#if defined(IDC_PAIRS)
  if constexpr (F == Form::kWords) {
    const auto* a = reinterpret_cast<const uint16_t*>(rows + 2 * step * row_bytes) + d;
    const bool alone = 2 * step + 1 == length;  // the last of an odd number: its partner is zero
    const auto* b = reinterpret_cast<const uint16_t*>(rows + (2 * step + (alone ? 0 : 1)) * row_bytes) + d;
    return load_pairs(a, n, b, alone ? 0 : n);
  }
#endif
  (void)length;
  return load_form<F>(rows + step * row_bytes, d, n);
}

// Groups of at most kMaxVectors vectors of channels, each [step][vectors * kLanes], zeros behind the head
// dim.
template <Form F>
IDC_NOINLINE void pack_v_form(const Plan& plan, const char* rows, int64_t row_bytes, int64_t length,
                              float* out) {
  const int64_t head_dim = plan.params->head_dim, steps = value_steps(plan, length);
  const Groups groups(ceil_div(head_dim, kLanes), kMaxVectors);
  for (int64_t g = 0; g < groups.count; ++g) {
    for (int64_t t = 0; t < steps; ++t) {
      for (int64_t i = 0; i < groups.size(g); ++i, out += kLanes) {
        const int64_t d = (groups.offset(g) + i) * kLanes;
        store(out, load_value<F>(rows, row_bytes, t, length, d, smaller(head_dim - d, kLanes)));
      }
    }
  }
}

#if defined(IDC_TILES)
// Groups of 16 channels, each [channel][word], words of zeros up to whole tiles.
void pack_v_tiles(const Plan& plan, const char* rows, int64_t row_bytes, int64_t length, float* out) {
  const int64_t steps = ceil_div(length, 2), words = whole_tiles(steps);
  for (int64_t d = 0; d < plan.params->head_dim; d += kTile, out += kTile * words) {
    for (int64_t s = 0; s < words; s += kTile) {
      V r[kTile];
#pragma GCC unroll 16
      for (int i = 0; i < kTile; ++i) {
        r[i] = s + i < steps ? load_value<Form::kWords>(rows, row_bytes, s + i, length, d, kLanes) : zero();
      }
      transpose(r);
#pragma GCC unroll 16
      for (int c = 0; c < kTile; ++c) store(out + c * words + s, r[c]);
    }
  }
}
#endif

void pack_v(const Plan& plan, const char* rows, int64_t row_bytes, int64_t length, float* out) {
#if defined(IDC_TILES)
  if (in_tiles(plan.params->head_dim, plan.pairs)) return pack_v_tiles(plan, rows, row_bytes, length, out);
#endif
  switch (form_of(plan)) {
    case Form::kFloat32:
      return pack_v_form<Form::kFloat32>(plan, rows, row_bytes, length, out);
    case Form::kBFloat16:
      return pack_v_form<Form::kBFloat16>(plan, rows, row_bytes, length, out);
    case Form::kFloat16:
      return pack_v_form<Form::kFloat16>(plan, rows, row_bytes, length, out);
    case Form::kWords:
#if defined(IDC_PAIRS)
      return pack_v_form<Form::kWords>(plan, rows, row_bytes, length, out);
#else
      return;
#endif
  }
}

}  // namespace
}  // namespace cpu
}  // namespace idcore
