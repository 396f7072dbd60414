// Second pass of the backward, and the only one of "add": the gradients of one item.
#pragma once

#include "cpu/tile_gather.h"

namespace idcore {
namespace cpu {
namespace {

// One block of rows: di = s w g + w n h; dh = before + s w beta alpha g + w n (i - 2 alpha h); returns
// sum w g (i + beta alpha h).
IDC_NOINLINE V merge_grad(const Panel& at, int64_t block, int j, const RowTerms& terms, const float* before) {
  const int64_t width = at.desk.width, offset = block * kRows * width, head_dim = at.plan.params->head_dim;
  const float *g = at.desk.g + offset, *h = at.desk.h + offset, *alphas = alpha_of(at, j);
  const float* numerators = numerator_of(at, j);
  float *di = at.desk.di + offset, *dh = at.desk.dh + offset;
  V dscale = zero();
  for (int64_t r = 0; r < kRows; ++r) {
    const V w = all(terms.weight[r]), amount = all(terms.amount[r]), beta = all(terms.beta[r]);
    for (int64_t d = 0; d < width; d += kLanes) {
      const int64_t e = r * width + d;
      const V alpha = load_words(alphas + d, smaller(head_dim - d, kLanes)), n = mul(w, load(numerators + d));
      const V gv = load(g + e), hv = load(h + e), iv = load(at.desk.i + e), share = mul(beta, alpha);
      const V sg = mul(amount, gv);
      store(di + e, fma(n, hv, sg));
      const V free = fma(mul(all(-2.0f), alpha), hv, iv);
      store(dh + e, fma(n, free, fma(share, sg, load(before + offset + e))));
      dscale = fma(mul(w, gv), fma(share, hv, iv), dscale);
    }
  }
  return dscale;
}

IDC_INLINE void add_scale_grad(const Panel& at, int j, V part) {
  float* to = at.plan.dscale + (at.item * at.plan.params->num_identities + j) * kLanes;
  store(to, add(load(to), part));
}

// Identity j of "add" in one block: p becomes s w P, ds the gradient of the logits.
template <class Dot>
IDC_INLINE void identity_add(const Panel& at, const Keys& keys, int j, int64_t block, float* p, float* ds) {
  const IdAttentionParams& params = *at.plan.params;
  float top[kRows], weight[kRows], amount[kRows];
  region(params.identity[j], at.batch, at.row_of(block), at.valid_in(block), weight, amount);
  const SumOfTwo sum = identity_exponentials<Dot>(at, keys, block, nullptr, top, p);
  at.coming.step();
  dots<Dot>(at.x_lanes(block), keys.v_dots, keys.length, params.head_dim, ds, top);
  SumOfTwo delta = row_dots(p, ds, keys.length);
  delta.a = div(delta.a, sum.a);
  delta.b = div(delta.b, sum.b);
  add_scale_grad(at, j, fma(load(weight), delta.a, mul(load(weight + kLanes), delta.b)));
  normalise(p, keys.length, sum, amount);
  softmax_grad(p, ds, keys.length, delta, logit_scale(params));
}

// Gradient of the logits from the lanes of a branch's gradient in one block; `zeros`: p holds zero tokens'
// part too.
template <class Dot>
IDC_INLINE void logits_grad(const Panel& at, const Keys& keys, bool zeros, const float* lanes, const float* p,
                            float* ds) {
  const IdAttentionParams& params = *at.plan.params;
  float top[kRows];
  at.coming.step();
  dots<Dot>(lanes, keys.v_dots, keys.length, params.head_dim, ds, top);
  const SumOfTwo delta = zeros ? row_dots(p, ds, keys.length) : row_means(p, ds, keys.length);
  softmax_grad(p, ds, keys.length, delta, logit_scale(params));
}

template <class Dot>
IDC_INLINE void identity_ortho(const Panel& at, const Keys& keys, int j, int64_t block, const float* before,
                               float* p, float* ds) {
  const BackwardPlan& plan = at.plan;
  const IdAttentionParams& params = *plan.params;
  const Desk& desk = at.desk;
  float top[kRows], da[kRows];
  RowTerms terms;
  row_terms(at, block, j, &terms);
  float* raw = plan.dshare == nullptr ? nullptr : desk.sharp;
  const SumOfTwo sum = identity_exponentials<Dot>(at, keys, block, raw, top, p);
  weigh_tokens<Dot>(p, keys.v_rows, keys.length, desk.width, desk.words, desk.i, true);
  divide_rows(desk.i, desk.width, sum);
  normalise(p, keys.length, sum, nullptr);
  add_scale_grad(at, j, merge_grad(at, block, j, terms, before));
  as_operand<Dot>(desk.di, block, params.head_dim, at.x_lanes(block), desk.half);
  logits_grad<Dot>(at, keys, params.num_zero > 0, at.x_lanes(block), p, ds);
  if (raw == nullptr) return;
  const int64_t rows = plan.segments * kSegmentRows;
  row_values(plan.dshare + (j * params.batch + at.batch) * params.heads * rows + at.row_of(block),
             at.valid_in(block), da);
  add_share_grad(params, raw, keys.length, top, da, ds);
}

// dq, dK and dV of one branch, from the weights of all blocks of the panel; x: what its values were weighed
// for.
template <class Dot>
IDC_INLINE void branch_grads(const Panel& at, const Keys& keys, bool first_branch, const float* x) {
  const Desk& desk = at.desk;
  const int64_t stride = keys.length * kRows, width = desk.width;
  for (int64_t m = 0; m < at.blocks(); ++m) {
    at.coming.step();
    weigh_tokens<Dot>(desk.ds + m * stride, keys.k_rows, keys.length, width, desk.words,
                      desk.dq + m * kRows * width, first_branch);
  }
  if (keys.dk == nullptr) return;
  at.coming.step();
  weigh_rows<Dot>(desk.ds, at.blocks(), desk.q, keys.length, width, keys.dk, at.first);
  at.coming.step();
  weigh_rows<Dot>(desk.p, at.blocks(), x, keys.length, width, keys.dv, at.first);
}

template <class Dot>
IDC_INLINE void text_grads(const Panel& at, float* dh, bool first_branch) {
  const Keys keys = keys_of(at, 0);
  const int64_t stride = keys.length * kRows;
  for (int64_t m = 0; m < at.blocks(); ++m) {
    float *p = at.desk.p + m * stride, *ds = at.desk.ds + m * stride;
    normalise(p, keys.length, text_exponentials<Dot>(at, keys, m, p), nullptr);
    if (at.plan.two_passes) as_operand<Dot>(dh, m, at.plan.params->head_dim, at.x_lanes(m), at.desk.half);
    logits_grad<Dot>(at, keys, false, at.x_lanes(m), p, ds);
  }
  branch_grads<Dot>(at, keys, first_branch, dh);
}

template <class Dot>
IDC_INLINE void scatter_panel(const Panel& at) {
  const BackwardPlan& plan = at.plan;
  const IdAttentionParams& p = *plan.params;
  const Desk& desk = at.desk;
  load_panel<Dot>(at, p.q, desk.q_lanes, desk.q);
  if (plan.two_passes) {
    load_panel(at, plan.grads->g, desk.g);
    load_rows(plan.wait_dtype, text_of(at), desk.width * element_bytes(plan.wait_dtype), at.valid,
              at.blocks() * kRows, desk.width, desk.h);
  } else {
    load_panel<Dot>(at, plan.grads->g, desk.x_lanes, desk.g);
  }
  for (int j = 0; j < p.num_identities; ++j) {
    const Keys keys = keys_of(at, j + 1);
    const int64_t stride = keys.length * kRows;
    for (int64_t m = 0; m < at.blocks(); ++m) {
      float *prob = desk.p + m * stride, *ds = desk.ds + m * stride;
      if (plan.two_passes) {
        identity_ortho<Dot>(at, keys, j, m, j == 0 ? desk.g : desk.dh, prob, ds);
      } else {
        identity_add<Dot>(at, keys, j, m, prob, ds);
      }
    }
    branch_grads<Dot>(at, keys, j == 0, plan.two_passes ? desk.di : desk.g);
  }
  text_grads<Dot>(at, plan.two_passes ? desk.dh : desk.g, p.num_identities == 0);
  store_dq(at, plan.grads->dq);
}

template <class Dot>
void scatter(const BackwardPlan& plan, int64_t batch, int64_t segment, int64_t head, float* scratch) {
  const IdAttentionParams& p = *plan.params;
  const Desk desk = desk_of(p, scratch);
  const int64_t steps = (1 + p.num_identities) * (3 * kPanelBlocks + 2);
  for_panels(plan, desk, batch, segment, head, &plan.grads->g, &plan.grads->dq, steps, [&](const Panel& at) {
    float* dscale = plan.dscale + at.item * p.num_identities * kLanes;
    for (int64_t j = 0; at.first && j < p.num_identities; ++j) store(dscale + j * kLanes, zero());
    scatter_panel<Dot>(at);
  });
}

void pack_twice(DType type, bool pairs, const char* rows, int64_t row_bytes, int64_t length, int64_t head_dim,
                float* dots, float* by_row) {
  pack_dots(form_of(type, pairs), rows, row_bytes, length, pairs ? head_dim / 2 : head_dim, dots);
#if defined(IDC_PAIRS)
  if (pairs) return load_row_pairs(rows, row_bytes, length, length, head_dim, by_row);
#endif
  load_rows(type, rows, row_bytes, length, length, head_dim, by_row);
}

void store_gradient(DType type, const float* rows, int64_t length, int64_t head_dim, void* out) {
  store_rows(rows, length, padded(head_dim), type, static_cast<char*>(out), head_dim * element_bytes(type), 0,
             head_dim);
}

}  // namespace
}  // namespace cpu
}  // namespace idcore
