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

}  // namespace idcore
