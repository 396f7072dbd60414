// The losses on attention maps, as plain data: `token_attention_loss` and `semantic_alignment`. Strides in
// elements.
#pragma once

#include "id_attention.h"

namespace idcore {

// sum over samples, heads, rows and tokens of weight (softmax(q k^T / sqrt(D)) - softmax(q k_ref^T /
// sqrt(D)))^2.
struct TokenLossParams {
  DType dtype;
  int64_t batch, heads, lq, lt, head_dim;
  HeadTensor q, k, k_ref;
  const float* weight;  // element (b, token)
  int64_t weight_stride_batch, weight_stride_token;
};

// Its gradient: `factor` is twice the sum's gradient over sqrt(D).
struct TokenLossGrads {
  float factor;
  HeadTensor dq;
  void* dk;  // contiguous, shape and dtype of k
};

// softmax over the rows of k q^T / sqrt(D), times q. Results contiguous.
struct SemanticParams {
  DType dtype;
  int64_t batch, heads, lq, lt, head_dim;
  HeadTensor q, k;
  void* out;   // [B, H, Lt, D], dtype of the call
  float* lse;  // log2 of the softmax sums, the largest logit included. [B, H, Lt]
};

struct SemanticGrads {
  HeadTensor g;        // of out
  const float* lse;    // [B, H, Lt]
  const float* delta;  // sum over channels of g out. [B, H, Lt]
  HeadTensor dq;
  void* dk;  // contiguous, shape and dtype of k
};

}  // namespace idcore
