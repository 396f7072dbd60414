// The forward's first pass over one chunk of rows in one head.
#pragma once

#include "cpu/tile_values.h"
#if defined(IDC_PAIRS)
#include "cpu/tile_pairs.h"
#endif
#if defined(IDC_TILES)
#include "cpu/tile_amx.h"
#endif

namespace idcore {
namespace cpu {
namespace {

constexpr float kLog2e = 1.44269504088896341f;

IDC_NOINLINE void scale_scores(float* scores, int64_t length, const float* gain) {
  const V g0 = load(gain), g1 = load(gain + kLanes);
  for (int64_t t = 0; t < length; ++t, scores += kRows) {
    store(scores, mul(g0, load(scores)));
    store(scores + kLanes, mul(g1, load(scores + kLanes)));
  }
}

IDC_INLINE float scale_of(const Identity& id, int64_t batch) {
  return id.scale_data == nullptr ? id.scale : id.scale_data[batch * id.scale_stride];
}

// w and s w of a block's rows; rows behind the valid ones count as 0.
IDC_INLINE void region(const Identity& id, int64_t batch, int64_t row, int64_t valid, float* weight,
                       float* amount) {
  const float s = scale_of(id, batch);
  const float* mask = id.mask == nullptr ? nullptr : id.mask + batch * id.mask_stride_batch;
  for (int v = 0; v < kRows; v += kLanes) {
    if (mask == nullptr && valid - v >= kLanes) {
      store(weight + v, all(1.0f));
    } else {
      for (int64_t r = v; r < v + kLanes; ++r)
        weight[r] = r >= valid ? 0.0f : mask == nullptr ? 1.0f : mask[(row + r) * id.mask_stride_row];
    }
    store(amount + v, mul(all(s), load(weight + v)));
  }
}

// Everything about one block that does not depend on which of the two merges it is.
struct BlockJob {
  const Plan& plan;
  int64_t batch, head, row, valid;
  float* q;       // [step][kRows]
  float* scores;  // of all branches, one behind the other
  Ahead& ahead;
};

IDC_INLINE void load_queries(const BlockJob& j) {
  const HeadTensor& q = j.plan.params->q;
  const int64_t bytes = element_bytes(j.plan.params->dtype), row_bytes = q.stride_row * bytes;
  const char* rows = head_start(q, bytes, j.batch, j.head) + j.row * row_bytes;
  const int64_t steps = score_steps(j.plan);
  const Form form = form_of(j.plan);
  transpose_rows(form, rows, row_bytes, j.valid, steps, j.q, kRows);
  transpose_rows(form, rows + kLanes * row_bytes, row_bytes, j.valid - kLanes, steps, j.q + kLanes, kRows);
}

IDC_INLINE SumOfTwo text_softmax(const BlockJob& j, float* scores, float* top, float scale) {
  const TextBias& bias = j.plan.params->text_bias;
  const int64_t length = j.plan.params->lt;
  if (bias.data == nullptr) return exponentials(scores, length, scale, top);
  const int64_t at = j.batch * bias.stride_batch + j.head * bias.stride_head + j.row * bias.stride_row;
  add_bias(bias, at, j.valid, length, scale, scores, top);
  return exponentials(scores, length, 1.0f, top);
}

IDC_INLINE void put_norm(float* norm, const SumOfTwo& sum) {
  store(norm, div(all(1.0f), sum.a));
  store(norm + kLanes, div(all(1.0f), sum.b));
}

// What turns probabilities into the operand of the value product: nothing, or bf16 pairs.
template <bool kPairs>
IDC_INLINE void finish_scores(float* scores, int64_t length) {
#if defined(IDC_PAIRS)
  if constexpr (kPairs) to_pairs(scores, length, scores);
#endif
  (void)scores, (void)length;
}

// The same, times `gain` per row.
template <bool kPairs>
IDC_INLINE void finish_scores(float* scores, int64_t length, const float* gain) {
#if defined(IDC_PAIRS)
  if constexpr (kPairs) return to_pairs(scores, length, gain, scores);
#endif
  scale_scores(scores, length, gain);
}

IDC_INLINE float scale_of_logits(const IdAttentionParams& p) {
  return kLog2e / __builtin_sqrtf(static_cast<float>(p.head_dim));
}

// Text scores of a block to probabilities; returns their sums.
template <class Dot, bool kPairs>
IDC_INLINE SumOfTwo text_part(const BlockJob& j, const float* k, Block& block) {
  const IdAttentionParams& p = *j.plan.params;
  const float scale = scale_of_logits(p);
  alignas(64) float top[kRows];
  score_branch<Dot>(j.q, k, p.lt, score_steps(j.plan), j.ahead, j.scores, top);
  const SumOfTwo sum = text_softmax(j, j.scores, top, scale);
  put_norm(block.norm[0], sum);
  if (j.plan.stats.lse_text != nullptr) {
    const float units = p.text_bias.data == nullptr ? scale : 1.0f;
    store_lse(j.plan.stats.lse_text + (j.batch * p.heads + j.head) * p.lq + j.row, sum, units, top, j.valid);
  }
  finish_scores<kPairs>(j.scores, p.lt);
  block.scores[0] = j.scores;
  return sum;
}

// Scores of identity i of a block to probabilities, and 1 / their sums. `share` null: not wanted.
template <class Dot>
IDC_INLINE void identity_part(const BlockJob& j, int i, const float* k, float* scores, float* norm,
                              float* share) {
  const IdAttentionParams& p = *j.plan.params;
  const IdAttentionStats& stats = j.plan.stats;
  const int64_t length = p.identity[i].length;
  const int64_t at = ((i * p.batch + j.batch) * p.heads + j.head) * p.lq + j.row;
  const float scale = scale_of_logits(p);
  const ShareOptions options{p.head_dim, p.num_zero, p.num_global,
                             stats.lse_unscaled == nullptr ? nullptr : stats.lse_unscaled + at, j.valid};
  alignas(64) float top[kRows];
  score_branch<Dot>(j.q, k, length, score_steps(j.plan), j.ahead, scores, top);
  const SumOfTwo sum = identity_softmax(scores, length, scale, top, options, share);
  put_norm(norm, sum);
  if (stats.lse_id != nullptr) store_lse(stats.lse_id + at, sum, scale, top, j.valid);
}

// Where the rows' shares of one head go; null: not wanted.
IDC_INLINE float* share_at(const BlockJob& j, int i) {
  const IdAttentionParams& p = *j.plan.params;
  if (j.plan.share == nullptr) return nullptr;
  return j.plan.share + ((i * p.batch + j.batch) * p.heads + j.head) * j.plan.chunks * kChunkRows + j.row;
}

// The identities' operands of the value product.
template <class Dot, bool kPairs>
IDC_INLINE void identities_part(const BlockJob& j, const Head& head, const SumOfTwo& text_sum, Block& block) {
  const IdAttentionParams& p = *j.plan.params;
  float* scores = j.scores + score_rows(p.lt) * kRows;
  for (int b = 1; b < block.branches; ++b) {
    const int64_t length = p.identity[b - 1].length;
    region(p.identity[b - 1], j.batch, j.row, j.valid, block.weight[b - 1], block.amount[b - 1]);
    identity_part<Dot>(j, b - 1, head.k[b], scores, block.norm[b], share_at(j, b - 1));
    if (p.merge == Merge::kAdd) {
      alignas(64) float gain[kRows];
      for (int v = 0; v < kRows; v += kLanes) {
        const V s = mul(load(block.amount[b - 1] + v), load(block.norm[b] + v));
        store(gain + v, mul(s, v == 0 ? text_sum.a : text_sum.b));
      }
      finish_scores<kPairs>(scores, length, gain);
    } else {
      finish_scores<kPairs>(scores, length);
    }
    block.scores[b] = scores;
    scores += score_rows(length) * kRows;
  }
}

int64_t row_floats(int64_t keys, int64_t head_dim) {
#if defined(IDC_TILES)
  keys += kMaxBranches * (kTile - 1);
#endif
  return (padded(head_dim) + keys) * kRows;
}

IDC_INLINE Stream rows_stream(const IdAttentionParams& p, const HeadTensor& t, int64_t batch, int64_t row,
                              int64_t last_row, int64_t head) {
  const int64_t bytes = element_bytes(p.dtype), row_bytes = t.stride_row * bytes;
  if (row >= last_row) return Stream{};
  return Stream{head_start(t, bytes, batch, head) + row * row_bytes, row_bytes, p.head_dim * bytes,
                smaller(last_row - row, kRows), 0};
}

IDC_INLINE int64_t groups_of_keys(const IdAttentionParams& p) {
  int64_t groups = ceil_div(p.lt, kMaxKeys);
  for (int j = 0; j < p.num_identities; ++j) groups += ceil_div(p.identity[j].length, kMaxKeys);
  return groups;
}

// What does not change from block to block of a head.
IDC_INLINE Block block_of(const Plan& plan, const Head& head, const Waiting& waiting) {
  const IdAttentionParams& p = *plan.params;
  Block block;
  block.head_dim = p.head_dim;
  block.dtype = p.dtype;
  block.branches = 1 + p.num_identities;
  block.out_row_bytes = p.out.stride_row * element_bytes(p.dtype);
  block.wait_dtype = waiting.mixed != nullptr ? DType::kFloat32 : p.dtype;
  block.text_row_bytes = plan.padded_dim * element_bytes(block.wait_dtype);
  block.text = nullptr;
  block.mixed = nullptr;
  block.sums = waiting.sums;
  for (int b = 0; b < block.branches; ++b) {
    block.values[b] = head.v[b];
    block.steps[b] = value_steps(plan, length_of(plan, b));
  }
  return block;
}

template <class Dot, bool kPairs>
void attend_chunk(const Plan& plan, const Head& head, int64_t chunk, const Waiting& waiting, float* scratch) {
  const IdAttentionParams& p = *plan.params;
  const int64_t first_row = chunk * kChunkRows, last_row = smaller(first_row + kChunkRows, p.lq);
  const int64_t rows_a_step = ceil_div(kRows, groups_of_keys(p));
  char* out = const_cast<char*>(head_start(p.out, element_bytes(p.dtype), head.batch, head.head));
  Block block = block_of(plan, head, waiting);
  if (waiting.sums != nullptr) {
    for (int64_t i = 0; i < p.num_identities * 2 * plan.padded_dim; i += kLanes)
      store(waiting.sums + i, zero());
  }
  for (int64_t row = first_row; row < last_row; row += kRows) {
    block.rows = smaller(last_row - row, kRows);
    block.out = out + row * block.out_row_bytes;
    if (waiting.text != nullptr) {
      const int64_t offset = (row - first_row) * block.text_row_bytes;
      block.text = static_cast<char*>(waiting.text) + offset;
      if (waiting.mixed != nullptr) block.mixed = reinterpret_cast<char*>(waiting.mixed) + offset;
    }
    const Stream text{block.text, block.text_row_bytes, block.text_row_bytes,
                      block.text == nullptr ? 0 : block.rows, 0};
    Ahead ahead{rows_stream(p, p.q, head.batch, row + kRows, p.lq, head.head),
                rows_stream(p, p.out, head.batch, row, last_row, head.head), text, rows_a_step};
    const BlockJob job{
        plan, head.batch, head.head, row, block.rows, scratch, scratch + padded(p.head_dim) * kRows, ahead};
    load_queries(job);
    const SumOfTwo text_sum = text_part<Dot, kPairs>(job, head.k[0], block);
    identities_part<Dot, kPairs>(job, head, text_sum, block);
    if (waiting.text == nullptr) {
      values<AddMerge, Dot>(block);
    } else {
      values<OrthoMerge, Dot>(block);
    }
  }
}

void attend(const Plan& plan, const Head& head, int64_t chunk, const Waiting& waiting, float* scratch) {
#if defined(IDC_TILES)
  if (in_tiles(plan.params->head_dim, plan.pairs)) {
    tiles_on();
    attend_chunk<Tiles, true>(plan, head, chunk, waiting, scratch);
    return tiles_off();
  }
#endif
#if defined(IDC_PAIRS)
  if (plan.pairs) return attend_chunk<Pairs, true>(plan, head, chunk, waiting, scratch);
#endif
  attend_chunk<Float32, false>(plan, head, chunk, waiting, scratch);
}

}  // namespace
}  // namespace cpu
}  // namespace idcore
