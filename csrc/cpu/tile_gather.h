// First pass of the backward of ortho and ortho_v2: h, and what needs sums over all rows before a gradient
// can be taken.
#pragma once

#include "cpu/tile_backward.h"

namespace idcore {
namespace cpu {
namespace {

// [kLanes][kLanes] floats to the sums of its rows.
IDC_INLINE V sums_of_rows(const float* rows) {
  V r[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) r[i] = load(rows + i * kLanes);
  transpose(r);
#pragma GCC unroll 16
  for (int i = 1; i < kLanes; ++i) r[0] = add(r[0], r[i]);
  return r[0];
}

// sums += sum over the block's rows of factor g h; rows of `along`: sum over channels of g h alpha, per lane.
IDC_NOINLINE void gather_sums(const float* g, const float* h, int64_t width, int64_t head_dim,
                              const float* factor, const float* alpha, float* sums, float* along) {
  for (int64_t d = 0; d < width; d += kLanes) {
    const V a = load_words(alpha + d, smaller(head_dim - d, kLanes));
    V sum = zero();  // of this block alone, as in the forward
    for (int r = 0; r < kRows; ++r) {
      const V gh = mul(load(g + r * width + d), load(h + r * width + d));
      sum = fma(all(factor[r]), gh, sum);
      store(along + r * kLanes, d == 0 ? mul(gh, a) : fma(gh, a, load(along + r * kLanes)));
    }
    store(sums + d, add(sum, load(sums + d)));
  }
}

IDC_INLINE void gather_identity(const Panel& at, int64_t block, int j) {
  const BackwardPlan& plan = at.plan;
  const IdAttentionParams& p = *plan.params;
  RowTerms terms;
  row_terms(at, block, j, &terms);
  float factor[kRows], along[kRows * kLanes];
  for (int v = 0; v < kRows; v += kLanes)
    store(factor + v, mul(load(terms.weight + v), load(terms.beta + v)));
  const int64_t width = at.desk.width, offset = block * kRows * width;
  gather_sums(at.desk.g + offset, at.desk.h + offset, width, p.head_dim, factor, alpha_of(at, j),
              plan.sums + (at.item * p.num_identities + j) * width, along);
  if (plan.dshare == nullptr) return;
  float* to = plan.dshare + ((j * p.batch + at.batch) * p.heads + at.head) * plan.segments * kSegmentRows +
              at.row_of(block);
  for (int v = 0; v < kRows; v += kLanes)
    store(to + v, mul(load(terms.amount + v), sums_of_rows(along + v * kLanes)));
}

// The division after the product, as in the forward: where alpha is a quotient of tiny sums, h must be the
// forward's to the last bit.
IDC_NOINLINE void divide_rows(float* rows, int64_t width, const SumOfTwo& sum) {
  float norm[kRows];
  put_norm(norm, sum);
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t d = 0; d < width; d += kLanes, rows += kLanes) store(rows, mul(all(norm[r]), load(rows)));
  }
}

template <class Dot>
IDC_INLINE void gather_panel(const Panel& at, const Keys& text) {
  const IdAttentionParams& p = *at.plan.params;
  const Desk& desk = at.desk;
  load_panel<Dot>(at, p.q, desk.q_lanes, desk.q);
  load_panel(at, at.plan.grads->g, desk.g);
  for (int64_t m = 0; m < at.blocks(); ++m) {
    const SumOfTwo sum = text_exponentials<Dot>(at, text, m, desk.p);
    at.coming.step();
    weigh_tokens<Dot>(desk.p, text.v_rows, text.length, desk.width, desk.words,
                      desk.h + m * kRows * desk.width, true);
    divide_rows(desk.h + m * kRows * desk.width, desk.width, sum);
    for (int j = 0; j < p.num_identities; ++j) gather_identity(at, m, j);
  }
  store_rows(desk.h, at.valid, desk.width, at.plan.wait_dtype, text_of(at),
             desk.width * element_bytes(at.plan.wait_dtype), 0, desk.width);
}

IDC_INLINE Stream rows_ahead(const IdAttentionParams& p, const HeadTensor* t, int64_t batch, int64_t head,
                             int64_t row, int64_t rows) {
  if (t == nullptr || t->data == nullptr || rows <= 0) return Stream{};
  const int64_t bytes = element_bytes(p.dtype), stride = t->stride_row * bytes;
  return Stream{head_start(*t, bytes, batch, head) + row * stride, stride, p.head_dim * bytes, rows, 0};
}

// Calls `visit` for the panels of one item. Rows of g and dq, null where there are none, are asked for in
// advance, in about `steps` portions a panel.
template <class Visit>
IDC_INLINE void for_panels(const BackwardPlan& plan, const Desk& desk, int64_t batch, int64_t segment,
                           int64_t head, const HeadTensor* g, const HeadTensor* dq, int64_t steps,
                           Visit visit) {
  const IdAttentionParams& p = *plan.params;
  const int64_t item = (batch * plan.segments + segment) * p.heads + head, first = segment * kSegmentRows;
  const int64_t last = smaller(first + kSegmentRows, p.lq);
  for (int64_t row = first; row < last; row += kPanelRows) {
    const int64_t next = row + kPanelRows, rows = smaller(last - next, kPanelRows);
    const int64_t valid = smaller(last - row, kPanelRows);
    Coming coming{rows_ahead(p, &p.q, batch, head, next, rows), rows_ahead(p, g, batch, head, next, rows),
                  rows_ahead(p, dq, batch, head, row, valid), ceil_div(kPanelRows, steps)};
    visit(Panel{plan, desk, coming, batch, head, item, row, valid, row == first});
  }
}

template <class Dot>
void gather(const BackwardPlan& plan, int64_t batch, int64_t segment, int64_t head, float* scratch) {
  const IdAttentionParams& p = *plan.params;
  const Desk desk = desk_of(p, scratch);
  for_panels(plan, desk, batch, segment, head, &plan.grads->g, nullptr, 2 * kPanelBlocks,
             [&](const Panel& at) {
               float* sums = plan.sums + at.item * p.num_identities * desk.width;
               for (int64_t d = 0; at.first && d < p.num_identities * desk.width; d += kLanes)
                 store(sums + d, zero());
               gather_panel<Dot>(at, keys_of(at, 0));
             });
}

}  // namespace
}  // namespace cpu
}  // namespace idcore
