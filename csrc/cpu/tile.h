// One chunk of rows in one head, both passes, and the unit's table. The last header that an ISA unit
// includes.
#pragma once

#include "cpu/tile_values.h"

namespace idcore {
namespace cpu {
namespace {

constexpr float kLog2e = 1.44269504088896341f;

#if defined(IDC_PAIRS)
// In place: [key][kRows] floats to [key / 2][kRows] pairs of bf16, times `gain` per row.
IDC_NOINLINE void to_pairs(float* scores, int64_t length, const float* gain) {
  const V g0 = load(gain), g1 = load(gain + kLanes);
  for (int64_t t = 0; t < length; t += 2) {
    const float* a = scores + t * kRows;
    const bool alone = t + 1 == length;
    const V a0 = mul(g0, load(a)), a1 = mul(g1, load(a + kLanes));
    const V b0 = alone ? zero() : mul(g0, load(a + kRows)),
            b1 = alone ? zero() : mul(g1, load(a + kRows + kLanes));
    store(scores + t / 2 * kRows, narrow_pairs(a0, b0));
    store(scores + t / 2 * kRows + kLanes, narrow_pairs(a1, b1));
  }
}
#endif

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
  for (int64_t r = 0; r < kRows; ++r) {
    const float w = r >= valid ? 0.0f : mask == nullptr ? 1.0f : mask[(row + r) * id.mask_stride_row];
    weight[r] = w;
    amount[r] = s * w;
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
  const bool second = j.valid > kLanes;  // else any rows will do for the second vector
  transpose_rows(form, second ? rows + kLanes * row_bytes : rows, row_bytes,
                 second ? j.valid - kLanes : j.valid, steps, j.q + kLanes, kRows);
}

template <class Dot>
IDC_INLINE void score(const BlockJob& j, int branch, float* scores, float* top) {
  const Packed& k = j.plan.k[branch];
  const int64_t row = batch_row(key_of(j.plan, branch), j.batch, j.plan.params->batch);
  score_branch<Dot>(j.q, k.data + row * k.stride_batch + j.head * k.stride_head, length_of(j.plan, branch),
                    score_steps(j.plan), j.ahead, scores, top);
}

IDC_INLINE const float* packed_values(const BlockJob& j, int branch) {
  const Packed& v = j.plan.v[branch];
  const int64_t row = batch_row(value_of(j.plan, branch), j.batch, j.plan.params->batch);
  return v.data + row * v.stride_batch + j.head * v.stride_head;
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

// What turns probabilities into the operand of the value product: nothing, a gain per row, or bf16 pairs.
template <bool kPairs>
IDC_INLINE void finish_scores(float* scores, int64_t length, const float* gain, bool gain_is_one) {
#if defined(IDC_PAIRS)
  if constexpr (kPairs) return to_pairs(scores, length, gain);
#endif
  if (!gain_is_one) scale_scores(scores, length, gain);
}

template <class Dot, bool kPairs>
void attend_block(const BlockJob& j, Block& block) {
  const IdAttentionParams& p = *j.plan.params;
  const float scale = kLog2e / __builtin_sqrtf(static_cast<float>(p.head_dim));
  const IdAttentionStats& stats = j.plan.stats;
  const int64_t stat_row = (j.batch * p.heads + j.head) * p.lq + j.row;
  float top[kRows], gain[kRows], one[kRows];
  store(one, all(1.0f));
  store(one + kLanes, all(1.0f));
  load_queries(j);
  float* scores = j.scores;
  SumOfTwo text_sum;
  for (int b = 0; b < block.branches; ++b) {
    const int64_t length = length_of(j.plan, b);
    score<Dot>(j, b, scores, top);
    block.scores[b] = scores;
    block.values[b] = packed_values(j, b);
    block.steps[b] = value_steps(j.plan, length);
    if (b == 0) {
      text_sum = text_softmax(j, scores, top, scale);
      put_norm(block.norm[0], text_sum);
      if (stats.lse_text != nullptr) {
        const float units = p.text_bias.data == nullptr ? scale : 1.0f;
        store_lse(stats.lse_text + stat_row, text_sum, units, top, j.valid);
      }
      finish_scores<kPairs>(scores, length, one, true);
    } else {
      const Identity& id = p.identity[b - 1];
      float* share = nullptr;
      if (p.merge == Merge::kOrthoV2) {
        share = j.plan.share +
                (((b - 1) * p.batch + j.batch) * p.heads + j.head) * j.plan.chunks * kChunkRows + j.row;
      }
      const int64_t at = (b - 1) * p.batch * p.heads * p.lq + stat_row;
      const ShareOptions options{p.head_dim, p.num_zero, p.num_global,
                                 stats.lse_unscaled == nullptr ? nullptr : stats.lse_unscaled + at, j.valid};
      const SumOfTwo sum = identity_softmax(scores, length, scale, top, options, share);
      put_norm(block.norm[b], sum);
      if (stats.lse_id != nullptr) store_lse(stats.lse_id + at, sum, scale, top, j.valid);
      region(id, j.batch, j.row, j.valid, block.weight[b - 1], block.amount[b - 1]);
      if (p.merge == Merge::kAdd) {
        for (int v = 0; v < kRows; v += kLanes) {
          const V s = mul(load(block.amount[b - 1] + v), load(block.norm[b] + v));
          store(gain + v, mul(s, v == 0 ? text_sum.a : text_sum.b));
        }
        finish_scores<kPairs>(scores, length, gain, false);
      } else {
        finish_scores<kPairs>(scores, length, one, true);
      }
    }
    scores += length * kRows;
  }
  if (p.merge == Merge::kAdd || block.branches == 1) {
    values<AddMerge, Dot>(block);
  } else {
    values<OrthoMerge, Dot>(block);
  }
}

int64_t row_floats(int64_t keys, int64_t head_dim) { return (padded(head_dim) + keys) * kRows; }

// The queries that come after the block at `row`: the next rows, or the next head's first.
IDC_INLINE Ahead look_ahead(const IdAttentionParams& p, int64_t batch, int64_t head, int64_t row,
                            int64_t first_row, int64_t last_row) {
  const int64_t bytes = element_bytes(p.dtype);
  Ahead ahead{};
  ahead.bytes = p.head_dim * bytes;
  ahead.read_stride = p.q.stride_row * bytes;
  const bool more_rows = row + kRows < last_row;
  if (!more_rows && head + 1 == p.heads) return ahead;
  const int64_t next = more_rows ? row + kRows : first_row;
  ahead.read = head_start(p.q, bytes, batch, more_rows ? head : head + 1) + next * ahead.read_stride;
  ahead.rows_read = smaller(last_row - next, kRows);
  return ahead;
}

template <class Dot, bool kPairs>
void attend_chunk(const Plan& plan, int64_t batch, int64_t chunk, int64_t head, float* scratch) {
  const IdAttentionParams& p = *plan.params;
  const int64_t bytes = element_bytes(p.dtype), first_row = chunk * kChunkRows;
  const int64_t last_row = smaller(first_row + kChunkRows, p.lq);
  const int64_t item = (batch * plan.chunks + chunk) * p.heads + head;
  Block block;
  block.head_dim = p.head_dim;
  block.dtype = p.dtype;
  block.branches = 1 + p.num_identities;
  block.out_row_bytes = p.out.stride_row * bytes;
  block.wait_dtype = plan.mixed != nullptr ? DType::kFloat32 : p.dtype;
  block.text_row_bytes = plan.padded_dim * element_bytes(block.wait_dtype);
  block.mixed = nullptr;
  char* out =
      static_cast<char*>(p.out.data) + (batch * p.out.stride_batch + head * p.out.stride_head) * bytes;
  if (plan.sums != nullptr) {
    const int64_t size = p.num_identities * 2 * plan.padded_dim;
    block.sums = plan.sums + item * size;
    for (int64_t i = 0; i < size; i += kLanes) store(block.sums + i, zero());
  }
  for (int64_t row = first_row; row < last_row; row += kRows) {
    block.rows = smaller(last_row - row, kRows);
    block.out = out + row * block.out_row_bytes;
    if (plan.text != nullptr) {
      const int64_t offset = (item * kChunkRows + row - first_row) * block.text_row_bytes;
      block.text = static_cast<char*>(plan.text) + offset;
      if (plan.mixed != nullptr) block.mixed = reinterpret_cast<char*>(plan.mixed) + offset;
    }
    Ahead ahead = look_ahead(p, batch, head, row, first_row, last_row);
    ahead.write = block.out;
    ahead.write_stride = block.out_row_bytes;
    ahead.rows_write = block.rows;
    const BlockJob job{plan, batch, head, row, block.rows, scratch, scratch + padded(p.head_dim) * kRows,
                       ahead};
    attend_block<Dot, kPairs>(job, block);
  }
}

void attend(const Plan& plan, int64_t batch, int64_t chunk, int64_t head, float* scratch) {
#if defined(IDC_PAIRS)
  if (plan.pairs) return attend_chunk<Pairs, true>(plan, batch, chunk, head, scratch);
#endif
  attend_chunk<Float32, false>(plan, batch, chunk, head, scratch);
}

template <class Dot>
IDC_NOINLINE double multiply_adds_of(int64_t rounds, int per_lane) {
  constexpr int kChains = kMaxKeys * 2;
  V acc[kChains];
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) acc[i] = all(static_cast<float>(i));
  V x = all(0.5f), y = all(0.25f);
  for (int64_t n = 0; n < rounds; ++n) {
#pragma GCC unroll 32
    for (int i = 0; i < kChains; ++i) {
      acc[i] = Dot::multiply_add(x, y, acc[i]);
      IDC_KEEP(acc[i]);
    }
  }
#pragma GCC unroll 32
  for (int i = 1; i < kChains; ++i) acc[0] = add(acc[0], acc[i]);
  float sink[kLanes];
  store(sink, acc[0]);
  const double flops = 2.0 * per_lane * kChains * kLanes * static_cast<double>(rounds);
  return sink[0] == -1.0f ? 0.0 : flops;  // the sums must count for something, or they would be left out
}

double multiply_adds(int64_t rounds, bool pairs) {
#if defined(IDC_PAIRS)
  if (pairs) return multiply_adds_of<Pairs>(rounds, 2);
#endif
  (void)pairs;
  return multiply_adds_of<Float32>(rounds, 1);
}

}  // namespace
}  // namespace cpu
}  // namespace idcore
