// Second pass of ortho and ortho_v2: out += sum_j s w (a - 1) alpha h, where alpha needs sums over all image
// rows.
#pragma once

#include "cpu/tile.h"
#include "cpu/tile_peak.h"

namespace idcore {
namespace cpu {
namespace {

IDC_INLINE V load_typed(DType dtype, const char* row, int64_t d, int64_t n) {
  switch (dtype) {
    case DType::kFloat32:
      return load_words(reinterpret_cast<const float*>(row) + d, n);
    case DType::kBFloat16:
      return load_bf16(reinterpret_cast<const uint16_t*>(row) + d, n);
    case DType::kFloat16:
      return load_fp16(reinterpret_cast<const uint16_t*>(row) + d, n);
  }
  return zero();
}

// Rows to ask for in advance (tuned), also of the chunk that comes next: the result's rows lie a whole [H, D]
// row apart.
constexpr int64_t kPrefetchRows = 16;

// Per row s w (a - 1), or -s w for ortho, of identity j. `factor` has kChunkRows floats.
IDC_NOINLINE void row_factors(const Plan& plan, int j, int64_t batch, int64_t chunk, int64_t rows,
                              float* factor) {
  const IdAttentionParams& p = *plan.params;
  const int64_t first_row = chunk * kChunkRows;
  float weight[kRows], amount[kRows];
  for (int64_t r = 0; r < rows; r += kRows) {
    region(p.identity[j], batch, first_row + r, smaller(rows - r, kRows), weight, amount);
    for (int v = 0; v < kRows; v += kLanes) {
      V a = all(-1.0f);
      if (p.merge == Merge::kOrthoV2)
        a = add(a, load(plan.mean + (j * p.batch + batch) * plan.chunks * kChunkRows + first_row + r + v));
      store(factor + r + v, mul(a, load(amount + v)));
    }
  }
}

// kType: of the result; kWait: of h and u.
template <DType kType, DType kWait>
IDC_NOINLINE void finish_rows(const Plan& plan, char* out, const Waiting& waiting, int64_t rows,
                              const float* factor, const float* alpha) {
  const IdAttentionParams& p = *plan.params;
  constexpr bool kInPlace = kType == kWait;
  const int64_t bytes = element_bytes(kType), width = plan.padded_dim,
                wait_bytes = width * element_bytes(kWait);
  const int64_t row_bytes = p.out.stride_row * bytes;
  const char* text = static_cast<const char*>(waiting.text);
  const char* mixed = reinterpret_cast<const char*>(waiting.mixed);
  // The last rows first: they are the most likely to be in the cache still.
  for (int64_t r = rows; r-- > 0;) {
    char* to = out + r * row_bytes;
    const char* from = text + r * wait_bytes;
    for (int64_t at = 0; at < p.head_dim * bytes; at += 64) {
      __builtin_prefetch(to - kPrefetchRows * row_bytes + at, 1, 3);
      __builtin_prefetch(from - kPrefetchRows * wait_bytes + at, 0, 3);
    }
    for (int64_t d = 0; d < width; d += kLanes) {
      V g = mul(all(factor[r]), load(alpha + d));
      for (int j = 1; j < p.num_identities; ++j) {
        g = fma(all(factor[j * kChunkRows + r]), load(alpha + j * width + d), g);
      }
      const int64_t n = smaller(p.head_dim - d, kLanes);
      const V u =
          kInPlace ? load_typed(kType, to, d, n) : load_typed(kWait, mixed + r * wait_bytes, d, kLanes);
      store_typed(kType, to, d, fma(g, load_typed(kWait, from, d, kLanes), u), n);
    }
  }
}

template <DType kType>
IDC_INLINE void finish_typed(const Plan& plan, char* out, const Waiting& waiting, int64_t rows,
                             const float* factor, const float* alpha) {
  if (waiting.mixed != nullptr)
    return finish_rows<kType, DType::kFloat32>(plan, out, waiting, rows, factor, alpha);
  finish_rows<kType, kType>(plan, out, waiting, rows, factor, alpha);
}

void finish(const Plan& plan, int64_t batch, int64_t head, int64_t chunk, const Waiting& waiting,
            const float* alpha) {
  const IdAttentionParams& p = *plan.params;
  const int64_t rows = smaller(p.lq - chunk * kChunkRows, kChunkRows), bytes = element_bytes(p.dtype);
  char* out = const_cast<char*>(head_start(p.out, bytes, batch, head)) +
              chunk * kChunkRows * p.out.stride_row * bytes;
  float factor[kMaxIdentities * kChunkRows];
  for (int j = 0; j < p.num_identities; ++j)
    row_factors(plan, j, batch, chunk, rows, factor + j * kChunkRows);
  switch (p.dtype) {
    case DType::kFloat32:
      return finish_typed<DType::kFloat32>(plan, out, waiting, rows, factor, alpha);
    case DType::kBFloat16:
      return finish_typed<DType::kBFloat16>(plan, out, waiting, rows, factor, alpha);
    case DType::kFloat16:
      return finish_typed<DType::kFloat16>(plan, out, waiting, rows, factor, alpha);
  }
}

}  // namespace
}  // namespace cpu
}  // namespace idcore
