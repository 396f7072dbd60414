// One item of `token_attention_loss` and `semantic_alignment`, forward and backward. Rows stand in lanes, as
// everywhere.
#pragma once

#include "cpu/tile_scatter.h"

namespace idcore {
namespace cpu {
namespace {

template <class Dot>
IDC_INLINE void load_queries_of(const Panel& at) {
  load_panel<Dot>(at, at.plan.params->q, at.desk.q_lanes, at.desk.q);
}

// Both maps of one block: p of k, r of k_ref.
template <class Dot>
IDC_INLINE void both_maps(const Panel& at, const Keys& keys, int64_t block, float* p, float* r) {
  const IdAttentionParams& params = *at.plan.params;
  const float scale = kLog2e * logit_scale(params);
  float top[kRows];
  at.coming.step();
  dots<Dot>(at.q_lanes(block), keys.k_dots, keys.length, params.head_dim, p, top);
  normalise(p, keys.length, exponentials(p, keys.length, scale, top), nullptr);
  at.coming.step();
  dots<Dot>(at.q_lanes(block), keys.v_dots, keys.length, params.head_dim, r, top);
  normalise(r, keys.length, exponentials(r, keys.length, scale, top), nullptr);
}

// r becomes weight (p - r); returns the sum of weight (p - r)^2 over tokens.
IDC_NOINLINE V weigh_difference(const LossPlan& plan, int64_t batch, int64_t length, const float* p,
                                float* r) {
  const float* weight = plan.weight + batch * plan.weight_stride_batch;
  V a = zero(), b = zero();
  for (int64_t t = 0; t < length; ++t, p += kRows, r += kRows) {
    const V w = all(weight[t * plan.weight_stride_token]);
    const V d0 = sub(load(p), load(r)), d1 = sub(load(p + kLanes), load(r + kLanes));
    const V wd0 = mul(w, d0), wd1 = mul(w, d1);
    a = fma(wd0, d0, a);
    b = fma(wd1, d1, b);
    store(r, wd0);
    store(r + kLanes, wd1);
  }
  return add(a, b);
}

template <class Dot>
void token_loss(const LossPlan& plan, int64_t batch, int64_t segment, int64_t head, float* scratch) {
  const Desk desk = desk_of(*plan.keys->params, scratch);
  for_panels(*plan.keys, desk, batch, segment, head, nullptr, nullptr, 2 * kPanelBlocks,
             [&](const Panel& at) {
               const Keys keys = keys_of(at, 0);
               float* loss = plan.loss + at.item * kLanes;
               if (at.first) store(loss, zero());
               load_queries_of<Dot>(at);
               for (int64_t m = 0; m < at.blocks(); ++m) {
                 both_maps<Dot>(at, keys, m, desk.p, desk.ds);
                 // Rows behind the valid ones are zeros: both their maps are even, so they add nothing.
                 store(loss, add(load(loss), weigh_difference(plan, batch, keys.length, desk.p, desk.ds)));
               }
             });
}

template <class Dot>
void token_loss_grad(const LossPlan& plan, int64_t batch, int64_t segment, int64_t head, float* scratch) {
  const Desk desk = desk_of(*plan.keys->params, scratch);
  for_panels(*plan.keys, desk, batch, segment, head, nullptr, &plan.dq, 3 * kPanelBlocks + 1,
             [&](const Panel& at) {
               const Keys keys = keys_of(at, 0);
               const int64_t stride = keys.length * kRows, width = desk.width;
               load_queries_of<Dot>(at);
               for (int64_t m = 0; m < at.blocks(); ++m) {
                 float* ds = desk.ds + m * stride;
                 both_maps<Dot>(at, keys, m, desk.p, ds);
                 weigh_difference(plan, batch, keys.length, desk.p, ds);
                 softmax_grad(desk.p, ds, keys.length, row_means(desk.p, ds, keys.length), plan.factor);
                 at.coming.step();
                 weigh_tokens<Dot>(ds, keys.k_rows, keys.length, width, desk.words,
                                   desk.dq + m * kRows * width, true);
               }
               at.coming.step();
               weigh_rows<Dot>(desk.ds, at.blocks(), desk.q, keys.length, width, keys.dk, at.first);
               store_dq(at, plan.dq);
             });
}

// Behind the desk: the weights and the queries of all rows of an item, and each token's largest logit per
// lane.
int64_t semantic_scratch(const IdAttentionParams& p) {
  return scratch_floats(p) + kSegmentRows * (p.lt + padded(p.head_dim)) + p.lt * kLanes;
}

// Lanes behind the valid rows of a block's [token][kRows] become `value`.
IDC_INLINE void fill_behind(float* weights, int64_t length, int64_t valid, float value) {
  for (int64_t t = 0; valid < kRows && t < length; ++t) {
    for (int64_t r = valid; r < kRows; ++r) weights[t * kRows + r] = value;
  }
}

IDC_NOINLINE void raise_tops(const float* scores, int64_t length, bool first, float* tops) {
  for (int64_t t = 0; t < length; ++t, scores += kRows, tops += kLanes) {
    const V most = larger(load(scores), load(scores + kLanes));
    store(tops, first ? most : larger(load(tops), most));
  }
}

// Scores of all blocks to 2^(scale (score - top)), and per token their sum; top and sum are of the whole
// item.
IDC_NOINLINE void row_softmax(float* scores, int64_t blocks, int64_t length, float scale, const float* tops,
                              float* top, float* sum) {
  for (int64_t t = 0; t < length; ++t) {
    float most = tops[t * kLanes];
    for (int i = 1; i < kLanes; ++i) most = tops[t * kLanes + i] > most ? tops[t * kLanes + i] : most;
    const V c = all(scale), shift = all(-scale * most);
    V a = zero(), b = zero();
    for (int64_t m = 0; m < blocks; ++m) {
      float* s = scores + (m * length + t) * kRows;
      const V e0 = exp2(fma(load(s), c, shift)), e1 = exp2(fma(load(s + kLanes), c, shift));
      store(s, e0);
      store(s + kLanes, e1);
      a = add(a, e0);
      b = add(b, e1);
    }
    float lanes[kLanes];
    store(lanes, add(a, b));
    top[t] = most;
    sum[t] = 0.0f;
    for (int i = 0; i < kLanes; ++i) sum[t] += lanes[i];
  }
}

template <class Dot>
void semantic(const LossPlan& plan, int64_t batch, int64_t segment, int64_t head, float* scratch) {
  const IdAttentionParams& p = *plan.keys->params;
  const Desk desk = desk_of(p, scratch);
  float* scores = scratch + scratch_floats(p);
  float* rows = scores + kSegmentRows * p.lt;
  float* tops = rows + kSegmentRows * desk.width;
  int64_t blocks = 0, item = 0;
  for_panels(*plan.keys, desk, batch, segment, head, nullptr, nullptr, kPanelBlocks, [&](const Panel& at) {
    const Keys keys = keys_of(at, 0);
    load_queries_of<Dot>(at);
    const int64_t block = kRows / Dot::kPerStep * desk.width;
    std::memcpy(rows + blocks * block, desk.q, static_cast<size_t>(at.blocks() * block) * sizeof(float));
    for (int64_t m = 0; m < at.blocks(); ++m, ++blocks) {
      float *s = scores + blocks * p.lt * kRows, unused[kRows];
      at.coming.step();
      dots<Dot>(at.q_lanes(m), keys.k_dots, p.lt, p.head_dim, s, unused);
      fill_behind(s, p.lt, at.valid_in(m), -__builtin_inff());
      raise_tops(s, p.lt, blocks == 0, tops);
    }
    item = at.item;
  });
  row_softmax(scores, blocks, p.lt, kLog2e * logit_scale(p), tops, plan.top + item * p.lt,
              plan.sum + item * p.lt);
  weigh_rows<Dot>(scores, blocks, rows, p.lt, desk.width, plan.keys->dv[0] + item * p.lt * desk.width, true);
}

// p becomes P, ds the gradient of the logits, over the rows of one block.
IDC_NOINLINE void row_softmax_grad(const LossPlan& plan, int64_t first_token, int64_t length, float scale,
                                   float gain, float* p, float* ds) {
  const V c = all(scale), g = all(gain);
  for (int64_t t = 0; t < length; ++t, p += kRows, ds += kRows) {
    const V shift = all(-plan.lse[first_token + t]), delta = all(plan.delta[first_token + t]);
    for (int v = 0; v < kRows; v += kLanes) {
      const V e = exp2(fma(load(p + v), c, shift));
      store(p + v, e);
      store(ds + v, mul(mul(g, e), sub(load(ds + v), delta)));
    }
  }
}

template <class Dot>
void semantic_grad(const LossPlan& plan, int64_t batch, int64_t segment, int64_t head, float* scratch) {
  const IdAttentionParams& p = *plan.keys->params;
  const Desk desk = desk_of(p, scratch);
  for_panels(*plan.keys, desk, batch, segment, head, nullptr, &plan.dq, 4 * kPanelBlocks + 1,
             [&](const Panel& at) {
               const Keys keys = keys_of(at, 0);
               const int64_t stride = p.lt * kRows, width = desk.width;
               float unused[kRows];
               load_queries_of<Dot>(at);
               for (int64_t m = 0; m < at.blocks(); ++m) {
                 float *ds = desk.ds + m * stride, *dq = desk.dq + m * kRows * width;
                 at.coming.step();
                 dots<Dot>(at.q_lanes(m), keys.k_dots, p.lt, p.head_dim, desk.p, unused);
                 at.coming.step();
                 dots<Dot>(at.q_lanes(m), keys.v_dots, p.lt, p.head_dim, ds, unused);
                 row_softmax_grad(plan, (batch * p.heads + head) * p.lt, p.lt, kLog2e * logit_scale(p),
                                  logit_scale(p), desk.p, ds);
                 fill_behind(ds, p.lt, at.valid_in(m), 0.0f);
                 at.coming.step();
                 weigh_tokens<Dot>(desk.p, keys.v_rows, p.lt, width, desk.words, dq, true);
                 at.coming.step();
                 weigh_tokens<Dot>(ds, keys.k_rows, p.lt, width, desk.words, dq, false);
               }
               at.coming.step();
               weigh_rows<Dot>(desk.ds, at.blocks(), desk.q, p.lt, width, keys.dk, at.first);
               store_dq(at, plan.dq);
             });
}

template <class Dot>
constexpr ItemKernels items() {
  return ItemKernels{gather<Dot>,          scatter<Dot>,  token_loss<Dot>,
                     token_loss_grad<Dot>, semantic<Dot>, semantic_grad<Dot>};
}

constexpr BackwardKernels backward_table() {
  BackwardKernels k{
      packed_dots_words, scratch_floats, semantic_scratch, pack_twice, store_gradient, items<Float32>(), {}};
#if defined(IDC_PAIRS)
  k.pairs = items<Pairs>();
#endif
  return k;
}

}  // namespace
}  // namespace cpu
}  // namespace idcore
