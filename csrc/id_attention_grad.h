// What the backward of `id_attention` needs of its forward, and where it writes: plain data only.
#pragma once

#include "id_attention.h"

namespace idcore {

// Row statistics of one forward, float32 and contiguous. n identities, `lse` is the base-2 logarithm of a
// softmax's denominator, its largest logit included. A null pointer: not wanted.
struct IdAttentionStats {
  float* lse_text;      // [B, H, Lq]
  float* lse_id;        // [n, B, H, Lq], zero tokens included
  float* lse_unscaled;  // [n, B, H, Lq], of the logits not divided by sqrt(D) (ortho_v2)
  float* share;         // [n, B, Lq], ortho_v2's a: mean over heads of what the first tokens get
  float* alpha;         // [n, B, H, D], ortho and ortho_v2
  float* den;           // [n, B, H, D], alpha's denominator sum w h h
};

// Gradients of one call. g and dq are [B, H, Lq, D] in the dtype of the call, the others contiguous in the
// shape of what they belong to and in its dtype. A null pointer: not wanted; K's and V's of one branch go
// together.
struct IdAttentionGrads {
  HeadTensor g;   // of the result
  HeadTensor dq;  // written, as all below
  void* dk_text;  // [Bt, H, Lt, D], with a stage bank [S, Bt, H, Lt, D] and zero where no sample reads
  void* dv_text;
  void* dk_id[kMaxIdentities];  // [Bi, H, Li, D]
  void* dv_id[kMaxIdentities];
  float* dscale;  // [n, B]
};

}  // namespace idcore
