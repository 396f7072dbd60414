// What an instruction-set unit offers to the driver of the backward, and the plan of a call.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "id_attention_grad.h"

namespace idcore {
namespace cpu {

// Image rows of one work item; each sums its own share of the gradients of K and V, and those are added in
// order, so that the number of threads does not change a bit (our choice).
constexpr int64_t kSegmentRows = 512;

// One K or V as float32 or pairs of bf16, repacked once per call: for dot products with rows, and row by row.
struct PackedTwice {
  float* dots;
  float* rows;
  int64_t count;                     // samples that it stands for: row b of the call reads b * count / B
  int64_t dots_stride, rows_stride;  // between heads
};

struct BackwardPlan {
  const IdAttentionParams* params;
  const IdAttentionStats* stats;
  const IdAttentionGrads* grads;
  bool pairs;          // bf16 operands stay bf16 and go through the dot-product instruction
  bool two_passes;     // ortho and ortho_v2 with identities
  int64_t segments;    // ceil(Lq / kSegmentRows)
  int64_t padded_dim;  // D rounded up to whole vectors
  PackedTwice k[kMaxBranches];
  PackedTwice v[kMaxBranches];
  // Sums of the segments, [B, segments, H] items of [length][padded_dim]; null: not wanted.
  float* dk[kMaxBranches];
  float* dv[kMaxBranches];
  float* dscale;  // sum w g (i + beta alpha h) over the item's rows, per lane. [items, n, lanes]
  // Only with two passes:
  void* text;  // h, between the passes. [items, kSegmentRows, padded_dim], of `wait_dtype`
  DType wait_dtype;
  float* sums;       // sum w beta g h over the item's rows. [items, n, padded_dim]
  float* numerator;  // gradient of alpha's numerator. [n, B, H, padded_dim]
  float*
      dshare;  // gradient of a, per head (ortho_v2). [n, B, H, segments * kSegmentRows]; their mean in head 0
};

// The losses on attention maps: k[0] holds the text's keys; v[0] the reference's, or the gradient of the
// result.
struct LossPlan {
  const BackwardPlan* keys;
  const float* weight;  // token_attention_loss: element (b, token)
  int64_t weight_stride_batch, weight_stride_token;
  float factor;        // of its gradient
  float* loss;         // sums per lane. [items, lanes]
  const float* lse;    // semantic_alignment: [B, H, Lt], log2 of the softmax sums over rows
  const float* delta;  // sum over channels of g out. [B, H, Lt]
  float* top;          // largest logit (unscaled) and sum of an item's rows. [items, Lt] each
  float* sum;
  HeadTensor dq;
};

// What works on items; each sums its own share of gradients.
struct ItemKernels {
  // First pass of ortho and ortho_v2 over one item: h, `sums`, `dshare`.
  void (*gather)(const BackwardPlan& plan, int64_t batch, int64_t segment, int64_t head, float* scratch);
  // The gradients of one item: dq, and its shares of all others.
  void (*scatter)(const BackwardPlan& plan, int64_t batch, int64_t segment, int64_t head, float* scratch);
  // One item each, sums of values in keys->dv[0], gradients of k in keys->dk[0].
  void (*token_loss)(const LossPlan& plan, int64_t batch, int64_t segment, int64_t head, float* scratch);
  void (*token_loss_grad)(const LossPlan& plan, int64_t batch, int64_t segment, int64_t head, float* scratch);
  void (*semantic)(const LossPlan& plan, int64_t batch, int64_t segment, int64_t head, float* scratch);
  void (*semantic_grad)(const LossPlan& plan, int64_t batch, int64_t segment, int64_t head, float* scratch);
};

struct BackwardKernels {
  int64_t (*packed_dots_words)(int64_t length, int64_t steps);
  int64_t (*scratch_floats)(const IdAttentionParams& params);  // per thread
  int64_t (*semantic_scratch)(const IdAttentionParams& params);
  // Both forms of one row of K or V: `rows` points at its first element.
  void (*pack)(DType type, bool pairs, const char* rows, int64_t row_bytes, int64_t length, int64_t head_dim,
               float* dots, float* by_row);
  // [length][padded] float32 to [length][head_dim] elements.
  void (*store)(DType type, const float* rows, int64_t length, int64_t head_dim, void* out);
  ItemKernels float32, pairs;  // the latter empty where the unit has no pairs
};

}  // namespace cpu
}  // namespace idcore
