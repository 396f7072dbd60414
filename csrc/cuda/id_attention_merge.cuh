// What ortho and ortho_v2 need after the sums over all image rows are known: the ratio alpha of every
// channel, each row's factor, and, for tiles whose X and h went to memory, the last step. Used by the
// attention kernel behind its barrier over the grid and by merge_kernel.
#pragma once

#include "cuda/id_attention_task.cuh"
#include "cuda/id_attention_tile.cuh"

namespace idcore {
namespace cuda {

// Shared memory of this step.
struct Merging {
  float* scratch;  // four for every thread, or n * 2 * D
  float* alpha;    // [n, D]
  float* factor;   // [n, rows]
};

IDCORE_DEVICE Merging merging(unsigned char* base, int n, int dim, int threads) {
  Merging m;
  m.scratch = reinterpret_cast<float*>(base);
  m.alpha = m.scratch + merging_scratch(n, dim, threads);
  m.factor = m.alpha + n * dim;
  return m;
}

// alpha of every identity for one head: the tiles' sums in a fixed order. Threads that would be idle take
// every parts-th tile each.
IDCORE_DEVICE void load_ratios(const Task& task, const Merging& m, int pair, int dim) {
  const int n = task.p.num_identities, words = n * dim / 2, threads = thread_count();
  const int parts = threads > words ? threads / words : 1;
  const Float4* from =
      reinterpret_cast<const Float4*>(task.sums) + static_cast<int64_t>(pair) * task.chunks * words;
  Float4* const scratch = reinterpret_cast<Float4*>(m.scratch);
  for (int item = thread_index(); item < parts * words; item += threads) {
    Float4 total = {{0.f, 0.f, 0.f, 0.f}};
    IDCORE_UNROLL_BY_4
    for (int chunk = item / words; chunk < task.chunks; chunk += parts) {
      const Float4 x = from[static_cast<int64_t>(chunk) * words + item % words];
      IDCORE_UNROLL
      for (int e = 0; e < 4; ++e) total.x[e] += x.x[e];
    }
    scratch[item] = total;
  }
  sync_block();
  for (int c = thread_index(); c < n * dim; c += threads) {
    const float* at = m.scratch + c / dim * 2 * dim + c % dim;
    float num = 0.f, den = 0.f;
    for (int part = 0; part < parts; ++part) {
      num += at[part * words * 4];
      den += at[part * words * 4 + dim];
    }
    m.alpha[c] = den == 0.f ? 0.f : num / den;
  }
}

// s w beta for one row: beta is -1, or for ortho_v2 the share averaged over heads, minus 1.
IDCORE_DEVICE float row_factor(const Task& task, int j, int64_t b, int64_t row) {
  const IdAttentionParams& p = task.p;
  const float weight = scale_of(p.identity[j], b) * mask_at(p.identity[j], b, row, p.lq);
  if (p.merge == Merge::kOrtho) return -weight;
  float total = 0.f;
  const float* at = task.share + (j * p.batch + b) * p.heads * p.lq + row;
  IDCORE_UNROLL_BY_4
  for (int h = 0; h < static_cast<int>(p.heads); ++h) total += at[h * p.lq];
  return weight * (total / static_cast<float>(p.heads) - 1.f);
}

IDCORE_DEVICE void load_factors(const Task& task, float* factor, const Spot& spot, int64_t first, int rows) {
  for (int c = thread_index(); c < task.p.num_identities * rows; c += thread_count()) {
    const int64_t row = first + c % rows;
    factor[c] = row < task.p.lq ? row_factor(task, c / rows, spot.b, row) : 0.f;
  }
}

// One word of 8 channels: x += sum_j factor_j alpha_j h.
template <class T>
IDCORE_DEVICE void merge_vector(Vector16& x, const Vector16& h, const float* factor, const float* alpha,
                                int n, int rows, int dim) {
  IDCORE_UNROLL
  for (int e = 0; e < 4; ++e) {
    float low = 0.f, high = 0.f;
    for (int j = 0; j < n; ++j) {
      low += factor[j * rows] * alpha[j * dim + 2 * e];
      high += factor[j * rows] * alpha[j * dim + 2 * e + 1];
    }
    x.word[e] =
        T::pack(T::low(x.word[e]) + low * T::low(h.word[e]), T::high(x.word[e]) + high * T::high(h.word[e]));
  }
}

// Rows first .. first + rows, whose h lies in task.text and whose X lies in out.
template <class T>
IDCORE_DEVICE void merge_rows(const Task& task, const Merging& m, const Spot& spot, int64_t first, int rows,
                              int dim) {
  const IdAttentionParams& p = task.p;
  const int vectors = dim / 8;
  const uint16_t* h = task.text + static_cast<int64_t>(spot.pair) * p.lq * dim;
  uint16_t* out = const_cast<uint16_t*>(head_of(p.out, p.batch, spot));
  for (int v = thread_index(); v < rows * vectors; v += thread_count()) {
    const int local = v / vectors, column = v % vectors * 8;
    const int64_t row = first + local;
    if (row >= p.lq) continue;
    uint16_t* to = out + row * p.out.stride_row + column;
    const Vector16 text = *reinterpret_cast<const Vector16*>(h + row * dim + column);
    Vector16 x = load_vector(to, task.aligned);
    merge_vector<T>(x, text, m.factor + local, m.alpha + column, p.num_identities, rows, dim);
    store_vector(to, x, task.aligned);
  }
}

constexpr int kMergeRows = 64;

// Blocks of kMergeRows rows, counted along the rows, then the heads, then the samples.
template <class T>
IDCORE_DEVICE void merge_block(const Task& task) {
  const IdAttentionParams& p = task.p;
  const int n = p.num_identities, dim = static_cast<int>(p.head_dim);
  const int chunks = static_cast<int>((p.lq + kMergeRows - 1) / kMergeRows);
  Spot spot;
  spot.pair = block_x() / chunks;
  spot.b = spot.pair / static_cast<int>(p.heads);
  spot.head = spot.pair % static_cast<int>(p.heads);
  spot.chunk = block_x() % chunks;
  const Merging m = merging(shared_memory(), n, dim, thread_count());
  const int64_t first = static_cast<int64_t>(spot.chunk) * kMergeRows;
  load_ratios(task, m, spot.pair, dim);
  load_factors(task, m.factor, spot, first, kMergeRows);
  sync_block();
  merge_rows<T>(task, m, spot, first, kMergeRows, dim);
}

}  // namespace cuda
}  // namespace idcore
