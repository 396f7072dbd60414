// The host-device contract of `id_attention`: plain data only, shared by the CPU and the CUDA forward.
//
// Letters: B batch, H heads, Lq image tokens, Lt text tokens, Li identity tokens, D head dim, n identities.
// All strides are in elements, never in bytes; the head dim of every tensor is contiguous.
#pragma once

#include <cstdint>

namespace idcore {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum class Merge : int32_t { kAdd = 0, kOrtho = 1, kOrthoV2 = 2 };

// Identities of one call. A fixed array keeps the struct plain, so that it can be a kernel argument.
constexpr int32_t kMaxIdentities = 16;
constexpr int32_t kMaxHeadDim = 256;

// [batch, H, L, D]. Sample b of the call reads row b * batch / B, so batch must divide B.
struct HeadTensor {
  void* data;
  int64_t batch;
  int64_t stride_batch;
  int64_t stride_head;
  int64_t stride_row;
};

// Additive bias of the text logits, broadcast by strides of zero. Element (b, h, row, token).
struct TextBias {
  const void* data;  // null: no bias
  DType dtype;
  int64_t stride_batch;
  int64_t stride_head;
  int64_t stride_row;
  int64_t stride_token;
};

struct Identity {
  HeadTensor k;
  HeadTensor v;
  int64_t length;           // Li, may be 0 when num_zero > 0
  float scale;              // used where scale_data is null
  const float* scale_data;  // one float per sample, on the tensors' device
  int64_t scale_stride;
  const float* mask;  // null: everywhere. Element (b, row)
  int64_t mask_stride_batch;
  int64_t mask_stride_row;
};

// A bank of text keys and values, one set per stage of the denoising: sample b reads stage index[b * stride].
// The index is read when the kernel runs, on the tensors' device, and kept inside the bank.
struct StageBank {
  const int32_t* index;  // null: no bank
  int64_t count;
  int64_t stride;    // 0: one index for all samples
  int64_t k_stride;  // between stages
  int64_t v_stride;
};

struct IdAttentionParams {
  DType dtype;  // of q, K, V and out; arithmetic is float32
  Merge merge;
  int64_t batch;
  int64_t heads;
  int64_t lq;
  int64_t lt;
  int64_t head_dim;
  int32_t num_zero;    // zero tokens behind every identity's own, in closed form
  int32_t num_global;  // tokens whose share makes ortho_v2's `a`
  int32_t num_identities;
  HeadTensor q;
  HeadTensor k_text;
  HeadTensor v_text;
  HeadTensor out;
  TextBias text_bias;
  Identity identity[kMaxIdentities];
  StageBank stage;
};

}  // namespace idcore
