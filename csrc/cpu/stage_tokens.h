// `stage_tokens` on the CPU: rows of word embeddings, some of them replaced, once per stage. Rows are only
// copied.
#pragma once

#include <cstdint>

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

}  // namespace cpu
}  // namespace idcore
