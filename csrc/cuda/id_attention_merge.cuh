// Second kernel of `id_attention`, for ortho and ortho_v2: what depends on sums over all image rows.
#pragma once

#include "cuda/id_attention_task.cuh"
#include "cuda/id_attention_tile.cuh"

namespace idcore {
namespace cuda {

// alpha of every identity for one head, into shared memory [n, D]: the blocks' sums in a fixed order.
IDCORE_DEVICE void load_ratios(const Task& task, float* alpha, int64_t b, int64_t head, int dim) {
  const IdAttentionParams& p = task.p;
  const int64_t plane = p.batch * p.heads * dim;
  for (int c = thread_index(); c < p.num_identities * dim; c += thread_count()) {
    const float* at = task.sums + (c / dim) * 2 * plane + (b * p.heads + head) * dim + c % dim;
    float num = 0.f, den = 0.f;
    for (int block = 0; block < task.blocks; ++block) {
      num += at[block * 2 * p.num_identities * plane];
      den += at[block * 2 * p.num_identities * plane + plane];
    }
    alpha[c] = den == 0.f ? 0.f : num / den;
  }
}

// s w beta for one row: beta is -1, or for ortho_v2 the share averaged over heads, minus 1.
IDCORE_DEVICE float row_factor(const Task& task, int j, int64_t b, int64_t row) {
  const IdAttentionParams& p = task.p;
  const float weight = scale_of(p.identity[j], b) * mask_at(p.identity[j], b, row, p.lq);
  if (p.merge == Merge::kOrtho) return -weight;
  float total = 0.f;
  const float* at = task.share + (j * p.batch + b) * p.heads * p.lq + row;
  for (int64_t h = 0; h < p.heads; ++h) total += at[h * p.lq];
  return weight * (total / static_cast<float>(p.heads) - 1.f);
}

constexpr int kMergeRows = 64;

// Grid (blocks of kMergeRows rows, H, B). out += sum_j s_j w_j beta_j alpha_j h.
template <class T>
IDCORE_DEVICE void merge_rows(const Task& task) {
  const IdAttentionParams& p = task.p;
  const int n = p.num_identities, dim = static_cast<int>(p.head_dim), vectors = dim / 8;
  const int64_t head = block_y(), b = block_z(), first = static_cast<int64_t>(block_x()) * kMergeRows;
  float* const alpha = reinterpret_cast<float*>(shared_memory());
  float* const factor = alpha + n * dim;
  load_ratios(task, alpha, b, head, dim);
  for (int c = thread_index(); c < n * kMergeRows; c += thread_count()) {
    const int64_t row = first + c % kMergeRows;
    factor[c] = row < p.lq ? row_factor(task, c / kMergeRows, b, row) : 0.f;
  }
  sync_block();
  const uint16_t* h = task.text + (b * p.heads + head) * p.lq * dim;
  uint16_t* out = const_cast<uint16_t*>(head_of(p.out, p.batch, b, head));
  for (int v = thread_index(); v < kMergeRows * vectors; v += thread_count()) {
    const int local = v / vectors, column = v % vectors * 8;
    const int64_t row = first + local;
    if (row >= p.lq) continue;
    uint16_t* to = out + row * p.out.stride_row + column;
    const Vector16 text = *reinterpret_cast<const Vector16*>(h + row * dim + column);
    Vector16 x;
    if (task.aligned) {
      x = *reinterpret_cast<const Vector16*>(to);
    } else {
      IDCORE_UNROLL
      for (int e = 0; e < 4; ++e) x.word[e] = to[2 * e] | static_cast<uint32_t>(to[2 * e + 1]) << 16;
    }
    IDCORE_UNROLL
    for (int e = 0; e < 4; ++e) {
      float low = 0.f, high = 0.f;
      for (int j = 0; j < n; ++j) {
        low += factor[j * kMergeRows + local] * alpha[j * dim + column + 2 * e];
        high += factor[j * kMergeRows + local] * alpha[j * dim + column + 2 * e + 1];
      }
      x.word[e] = T::pack(T::low(x.word[e]) + low * T::low(text.word[e]),
                          T::high(x.word[e]) + high * T::high(text.word[e]));
    }
    if (task.aligned) {
      *reinterpret_cast<Vector16*>(to) = x;
    } else {
      IDCORE_UNROLL
      for (int e = 0; e < 8; ++e) to[e] = static_cast<uint16_t>(x.word[e / 2] >> (e % 2 * 16));
    }
  }
}

}  // namespace cuda
}  // namespace idcore
