// What ortho_v2 needs before anything else: its `a` is a mean over heads, so all heads' identity scores come
// first.
#pragma once

#include "cpu/tile.h"

namespace idcore {
namespace cpu {
namespace {

// The mean over heads of a block's rows.
IDC_INLINE void store_share(const Plan& plan, int i, int64_t batch, int64_t row, int64_t valid,
                            const float* sum) {
  const IdAttentionParams& p = *plan.params;
  const V part = all(1.0f / static_cast<float>(p.heads));
  float* share = plan.share + (i * p.batch + batch) * plan.chunks * kChunkRows + row;
  for (int v = 0; v < kRows; v += kLanes) store(share + v, mul(part, load(sum + v)));
  if (plan.stats.share == nullptr) return;
  float* wanted = plan.stats.share + (i * p.batch + batch) * p.lq + row;
  for (int64_t r = 0; r < valid; ++r) wanted[r] = share[r];
}

// The block that comes after this one: the next head of the same rows, or the first head of the next rows.
IDC_INLINE Ahead ahead_of(const Plan& plan, int64_t batch, int64_t row, int64_t last_row, int64_t head) {
  const IdAttentionParams& p = *plan.params;
  const bool more_heads = head + 1 < p.heads;
  Ahead ahead{rows_stream(p, p.q, batch, more_heads ? row : row + kRows, last_row, more_heads ? head + 1 : 0),
              Stream{}, ready_stream(plan, batch, row, head), 0, 0};
  ahead.spread(score_groups(plan, false, true));
  return ahead;
}

template <class Dot, bool kPairs>
void identities_of_rows(const Plan& plan, const IdentityKeys& keys, int64_t batch, int64_t first_row,
                        int64_t last_row, float* scratch) {
  const IdAttentionParams& p = *plan.params;
  float* scratch_scores = scratch + padded(p.head_dim) * kRows;
  for (int64_t row = first_row; row < last_row; row += kRows) {
    const int64_t valid = smaller(last_row - row, kRows);
    float sum[kMaxIdentities][kRows];
    for (int i = 0; i < p.num_identities; ++i) {
      for (int v = 0; v < kRows; v += kLanes) store(sum[i] + v, zero());
    }
    for (int64_t head = 0; head < p.heads; ++head) {
      Ahead ahead = ahead_of(plan, batch, row, last_row, head);
      const BlockJob job{plan, batch, head, row, valid, scratch, scratch_scores, ahead};
      load_queries(job);
      float* ready = ready_at(plan, batch, row, head);
      for (int i = 0; i < p.num_identities; ++i) {
        const int64_t length = p.identity[i].length;
        float* norm = ready + value_steps(plan, length) * kRows;
        float* scores = kPairs ? scratch_scores : ready;  // pairs are narrower than what they are made of
        float share[kRows];
        identity_part<Dot>(job, i, keys.data[i] + head * keys.stride_head[i], scores, norm, share);
        finish_scores<kPairs>(scores, length, ready);
        for (int v = 0; v < kRows; v += kLanes) store(sum[i] + v, add(load(sum[i] + v), load(share + v)));
        ready = norm + kRows;
      }
    }
    for (int i = 0; i < p.num_identities; ++i) store_share(plan, i, batch, row, valid, sum[i]);
  }
}

void identities(const Plan& plan, const IdentityKeys& keys, int64_t batch, int64_t first_row,
                int64_t last_row, float* scratch) {
#if defined(IDC_PAIRS)
  if (plan.pairs) return identities_of_rows<Pairs, true>(plan, keys, batch, first_row, last_row, scratch);
#endif
  identities_of_rows<Float32, false>(plan, keys, batch, first_row, last_row, scratch);
}

}  // namespace
}  // namespace cpu
}  // namespace idcore
