// The gradients of one segment of rows in one head.
//
// With g the result's gradient, w mask, s scale, P and P_j the probabilities, beta = -1 or a - 1, and per
// channel
//   n_j = s sum w beta g h / den  (gradient of alpha's numerator; that of its denominator is -alpha n_j)
// the gradients of the text attention h and of identity j's attention i_j are
//   dh = g + sum_j (s w beta alpha_j g + w n_j (i_j - 2 alpha_j h)),    di_j = s w g + w n_j h,
// for "add" dh = g and di_j = s w g. Then two softmax gradients each, and for a the one of the unscaled
// softmax. A panel of a few blocks of rows goes through all branches before the next one, so that sums over
// rows stay long.
#pragma once

#include "cpu/kernels_bwd.h"
#include "cpu/tile.h"
#include "cpu/tile_products.h"

namespace idcore {
namespace cpu {
namespace {

constexpr int kPanelBlocks = 2;
constexpr int kPanelRows = kPanelBlocks * kRows;
static_assert(kSegmentRows % kPanelRows == 0, "panels must fill a segment");

// A thread's scratch memory. `rows`: [kPanelRows][width]; `lanes`: [block][head_dim][kRows]; weights
// [block][token][kRows].
struct Desk {
  int64_t width;
  float *q, *g, *h, *dh, *di, *dq;  // rows
  float *q_lanes, *x_lanes;
  float* i;       // rows of one block
  float *p, *ds;  // weights
  float* sharp;   // weights of one block, unscaled softmax
  float* words;   // weights of one block, pairs
  float* half;    // rows of one block, 16 bit
};

IDC_INLINE int64_t most_tokens(const IdAttentionParams& p) {
  int64_t most = p.lt;
  for (int j = 0; j < p.num_identities; ++j) most = most < p.identity[j].length ? p.identity[j].length : most;
  return most;
}

int64_t scratch_floats(const IdAttentionParams& p) {
  const int64_t words = score_rows(most_tokens(p)) * kRows;
  return (8 * kPanelRows + 2 * kRows) * padded(p.head_dim) + (2 * kPanelRows + kRows) * most_tokens(p) +
         words;
}

IDC_INLINE Desk desk_of(const IdAttentionParams& p, float* at) {
  const int64_t width = padded(p.head_dim), rows = kPanelRows * width, weights = kPanelRows * most_tokens(p);
  float *tokens = at + 8 * rows + kRows * width, *words = tokens + 2 * weights + kRows * most_tokens(p);
  return Desk{width,
              at,
              at + rows,
              at + 2 * rows,
              at + 3 * rows,
              at + 4 * rows,
              at + 5 * rows,
              at + 6 * rows,
              at + 7 * rows,
              at + 8 * rows,
              tokens,
              tokens + weights,
              tokens + 2 * weights,
              words,
              words + score_rows(most_tokens(p)) * kRows};
}

// Rows that a panel asks for, some at each product: the next panel's, and its own result's.
struct Coming {
  Stream q, g, dq;
  int64_t rows_a_step;

  IDC_INLINE void step() {
    q.step<0>(rows_a_step);
    g.step<0>(rows_a_step);
    dq.step<1>(rows_a_step);
  }
};

struct Panel {
  const BackwardPlan& plan;
  const Desk& desk;
  Coming& coming;
  int64_t batch, head, item, row, valid;  // `row`: the first of `valid` ones
  bool first;                             // of its segment

  IDC_INLINE int64_t blocks() const { return ceil_div(valid, kRows); }
  IDC_INLINE int64_t valid_in(int64_t block) const { return smaller(valid - block * kRows, kRows); }
  IDC_INLINE int64_t row_of(int64_t block) const { return row + block * kRows; }
  IDC_INLINE float* q_lanes(int64_t block) const { return desk.q_lanes + block * kRows * desk.width; }
  IDC_INLINE float* x_lanes(int64_t block) const { return desk.x_lanes + block * kRows * desk.width; }
};

// One branch in one head of one sample.
struct Keys {
  int64_t length;
  const float *k_dots, *k_rows, *v_dots, *v_rows;
  float *dk, *dv;
};

IDC_INLINE Keys keys_of(const Panel& at, int branch) {
  const BackwardPlan& plan = at.plan;
  const IdAttentionParams& p = *plan.params;
  const PackedTwice &k = plan.k[branch], &v = plan.v[branch];
  const int64_t length = branch == 0 ? p.lt : p.identity[branch - 1].length;
  const int64_t k_at = at.batch * k.count / p.batch * p.heads + at.head;
  const int64_t v_at = at.batch * v.count / p.batch * p.heads + at.head;
  const int64_t sums = at.item * length * at.desk.width;
  return Keys{length,
              k.dots + k_at * k.dots_stride,
              k.rows + k_at * k.rows_stride,
              v.dots + v_at * v.dots_stride,
              v.rows + v_at * v.rows_stride,
              plan.dk[branch] == nullptr ? nullptr : plan.dk[branch] + sums,
              plan.dv[branch] == nullptr ? nullptr : plan.dv[branch] + sums};
}

// One number per row of a block from a row statistic; 0 behind the valid rows.
IDC_INLINE void row_values(const float* from, int64_t valid, float* out) {
  store(out, load_words(from, smaller(valid, kLanes)));
  store(out + kLanes, valid > kLanes ? load_words(from + kLanes, valid - kLanes) : zero());
}

// Probabilities are taken anew with the sums of this pass: all keys of a row are at hand, and a rounded
// logarithm of the sum would leave its error in every one of them.
IDC_INLINE void normalise(float* weights, int64_t length, const SumOfTwo& sum, const float* gain) {
  float factor[kRows];
  put_norm(factor, sum);
  for (int v = 0; gain != nullptr && v < kRows; v += kLanes)
    store(factor + v, mul(load(factor + v), load(gain + v)));
  scale_scores(weights, length, factor);
}

// sum over tokens of p dp, per row.
IDC_NOINLINE SumOfTwo row_dots(const float* p, const float* dp, int64_t length) {
  SumOfTwo sum;
  for (int64_t t = 0; t < length * kRows; t += kRows) {
    sum.a = fma(load(p + t), load(dp + t), sum.a);
    sum.b = fma(load(p + t + kLanes), load(dp + t + kLanes), sum.b);
  }
  return sum;
}

// The same over sum p, for probabilities without zero tokens: their sum is 1 up to rounding, which a peaked
// row would show as a gradient.
IDC_NOINLINE SumOfTwo row_means(const float* p, const float* dp, int64_t length) {
  SumOfTwo sum, whole;
  for (int64_t t = 0; t < length * kRows; t += kRows) {
    const V p0 = load(p + t), p1 = load(p + t + kLanes);
    sum.a = fma(p0, load(dp + t), sum.a);
    sum.b = fma(p1, load(dp + t + kLanes), sum.b);
    whole.a = add(p0, whole.a);
    whole.b = add(p1, whole.b);
  }
  return SumOfTwo{div(sum.a, whole.a), div(sum.b, whole.b)};
}

// dp becomes gain p (dp - delta): the gradient of the logits.
IDC_NOINLINE void softmax_grad(const float* p, float* dp, int64_t length, const SumOfTwo& delta, float gain) {
  const V g = all(gain);
  for (int64_t t = 0; t < length * kRows; t += kRows) {
    store(dp + t, mul(mul(g, load(p + t)), sub(load(dp + t), delta.a)));
    store(dp + t + kLanes, mul(mul(g, load(p + t + kLanes)), sub(load(dp + t + kLanes), delta.b)));
  }
}

// Adds the gradient that reaches the logits through a, the share of the first tokens in the unscaled softmax.
// scores: unscaled logits, overwritten; top: each row's largest, 0 among them where there are zero tokens;
// da: the gradient of a over the number of heads.
IDC_NOINLINE void add_share_grad(const IdAttentionParams& p, float* scores, int64_t length, const float* top,
                                 const float* da, float* ds) {
  const SumOfTwo own = exponentials(scores, length, kLog2e, top);
  const int64_t counted = smaller(p.num_global, length), spare = smaller(p.num_global - counted, p.num_zero);
  for (int v = 0; v < kRows; v += kLanes) {
    V sum = v == 0 ? own.a : own.b, share = zero();
    if (p.num_zero > 0) {
      const V e = exp2(mul(load(top + v), all(-kLog2e)));
      sum = fma(all(static_cast<float>(p.num_zero)), e, sum);
      share = mul(all(static_cast<float>(spare)), e);
    }
    for (int64_t t = 0; t < counted; ++t) share = add(share, load(scores + t * kRows + v));
    const V norm = div(all(1.0f), sum), factor = mul(load(da + v), norm);
    const V inside = mul(factor, sub(all(1.0f), mul(share, norm)));
    const V outside = sub(inside, factor);
    for (int64_t t = 0; t < length; ++t) {
      float* to = ds + t * kRows + v;
      store(to, fma(load(scores + t * kRows + v), t < counted ? inside : outside, load(to)));
    }
  }
}

IDC_INLINE float logit_scale(const IdAttentionParams& p) {
  return 1.0f / __builtin_sqrtf(static_cast<float>(p.head_dim));
}

// The text's probabilities in one block of rows, before the division.
template <class Dot>
IDC_NOINLINE SumOfTwo text_exponentials(const Panel& at, const Keys& keys, int64_t block, float* out) {
  const IdAttentionParams& p = *at.plan.params;
  const TextBias& bias = p.text_bias;
  float top[kRows];
  at.coming.step();
  dots<Dot>(at.q_lanes(block), keys.k_dots, keys.length, p.head_dim, out, top);
  float scale = kLog2e * logit_scale(p);
  if (bias.data != nullptr) {
    const int64_t first =
        at.batch * bias.stride_batch + at.head * bias.stride_head + at.row_of(block) * bias.stride_row;
    add_bias(bias, first, at.valid_in(block), keys.length, scale, out, top);
    scale = 1.0f;
  }
  return exponentials(out, keys.length, scale, top);
}

// Identity j's probabilities in one block, before the division; raw: the unscaled logits, null: not wanted;
// top: each row's largest of them and of the zero tokens'.
template <class Dot>
IDC_NOINLINE SumOfTwo identity_exponentials(const Panel& at, const Keys& keys, int64_t block, float* raw,
                                            float* top, float* out) {
  const IdAttentionParams& p = *at.plan.params;
  at.coming.step();
  dots<Dot>(at.q_lanes(block), keys.k_dots, keys.length, p.head_dim, out, top);
  if (raw != nullptr) std::memcpy(raw, out, static_cast<size_t>(keys.length * kRows) * sizeof(float));
  const ShareOptions options{p.head_dim, p.num_zero, p.num_global, nullptr, 0};
  return identity_softmax(out, keys.length, kLog2e * logit_scale(p), top, options, nullptr);
}

IDC_INLINE void load_panel(const Panel& at, const HeadTensor& t, float* out) {
  const IdAttentionParams& p = *at.plan.params;
  const int64_t bytes = element_bytes(p.dtype), row_bytes = t.stride_row * bytes;
  load_rows(p.dtype, head_start(t, bytes, at.batch, at.head) + at.row * row_bytes, row_bytes, at.valid,
            at.blocks() * kRows, p.head_dim, out);
}

// The rows of one tensor as operands.
template <class Dot>
IDC_INLINE void load_panel(const Panel& at, const HeadTensor& t, float* lanes, float* out) {
  const IdAttentionParams& p = *at.plan.params;
  const int64_t bytes = element_bytes(p.dtype), row_bytes = t.stride_row * bytes;
  const char* rows = head_start(t, bytes, at.batch, at.head) + at.row * row_bytes;
  load_operand<Dot>(p.dtype, rows, row_bytes, at.valid, at.blocks(), p.head_dim, lanes, out);
}

IDC_INLINE void store_dq(const Panel& at, const HeadTensor& dq) {
  const IdAttentionParams& p = *at.plan.params;
  const int64_t bytes = element_bytes(p.dtype), row_bytes = dq.stride_row * bytes;
  char* out = const_cast<char*>(head_start(dq, bytes, at.batch, at.head)) + at.row * row_bytes;
  store_rows(at.desk.dq, at.valid, at.desk.width, p.dtype, out, row_bytes, 0, p.head_dim);
}

IDC_INLINE char* text_of(const Panel& at) {
  const int64_t bytes = at.desk.width * element_bytes(at.plan.wait_dtype);
  return static_cast<char*>(at.plan.text) + (at.item * kSegmentRows + at.row % kSegmentRows) * bytes;
}

// What a row's place means for identity j: w, s w, and beta = a - 1 or -1.
struct RowTerms {
  float weight[kRows], amount[kRows], beta[kRows];
};

IDC_INLINE void row_terms(const Panel& at, int64_t block, int j, RowTerms* terms) {
  const IdAttentionParams& p = *at.plan.params;
  region(p.identity[j], at.batch, at.row_of(block), at.valid_in(block), terms->weight, terms->amount);
  const float* share = at.plan.stats->share;
  for (int v = 0; v < kRows; v += kLanes) store(terms->beta + v, all(-1.0f));
  if (p.merge != Merge::kOrthoV2) return;
  float a[kRows];
  row_values(share + (j * p.batch + at.batch) * p.lq + at.row_of(block), at.valid_in(block), a);
  for (int v = 0; v < kRows; v += kLanes) store(terms->beta + v, add(load(a + v), load(terms->beta + v)));
}

IDC_INLINE const float* alpha_of(const Panel& at, int j) {
  const IdAttentionParams& p = *at.plan.params;
  return at.plan.stats->alpha + ((j * p.batch + at.batch) * p.heads + at.head) * p.head_dim;
}
IDC_INLINE const float* numerator_of(const Panel& at, int j) {
  const IdAttentionParams& p = *at.plan.params;
  return at.plan.numerator + ((j * p.batch + at.batch) * p.heads + at.head) * at.desk.width;
}

}  // namespace
}  // namespace cpu
}  // namespace idcore
