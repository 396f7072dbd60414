// `stage_tokens` on the CPU: rows of word embeddings, some of them replaced, once per stage. Forward copies
// rows, backward adds them up.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace idcore {
namespace cpu {

// Strides in bytes. Every row, of embeddings, tokens and result, has `row_bytes` contiguous bytes.
struct StageTokensParams {
  int64_t stages, batch, token_batch, length, tokens, row_bytes;
  const char* embeddings;  // [B, L]
  int64_t embeddings_batch, embeddings_row;
  const char* bank;  // [S, Bt, T]; sample b reads b * Bt / B
  int64_t bank_stage, bank_batch, bank_token;
  const int32_t* positions;                  // element (b, token); -1: left out
  int64_t positions_batch, positions_token;  // in elements
  const int32_t* stage;  // null: all stages; else element b picks one, kept inside the bank
  int64_t stage_stride;  // in elements
  char* out;             // contiguous [S, B, L], or [B, L] where a stage is picked
};

void stage_tokens(const StageTokensParams& params);

// Gradients of both inputs from `g`, that of the result: contiguous, in its shape. Strides in elements.
struct StageTokensGrads {
  DType dtype;  // of g and of the embeddings' gradient
  int64_t stages, batch, token_batch, length, tokens, width;
  const char* g;
  const int32_t* positions;  // as above, distinct within a sample
  int64_t positions_batch, positions_token;
  const int32_t* stage;
  int64_t stage_stride;
  char* embeddings;  // [B, L, E] of `dtype`; null: not wanted
  float* bank;       // [S, Bt, T, E]; the sum over the samples that read a token
};

// The same bits for any number of threads. Throws std::bad_alloc.
void stage_tokens_bwd(const StageTokensGrads& grads, const Kernels& kernels);

}  // namespace cpu
}  // namespace idcore
