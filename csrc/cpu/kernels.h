// What an instruction-set unit offers to the driver, and the plan of a call that the driver hands to it.
#pragma once

#include <cstdint>

#include "id_attention_bwd.h"

namespace idcore {
namespace cpu {

// Image rows of one work item. Fixed, so that sums over rows are added in one order whatever the threads.
constexpr int64_t kChunkRows = 128;
// 16-bit calls with at most so many rows keep h and u in float32 between the passes of ortho (our choice).
constexpr int64_t kFewRows = 256;
// Branch 0 is the text, branch j + 1 is identity j.
constexpr int kMaxBranches = 1 + kMaxIdentities;

// K or V of one branch, repacked once per call: float32, or pairs of bf16 in one 32-bit word.
struct Packed {
  float* data;
  int64_t stride_batch;
  int64_t stride_head;
};

struct Plan {
  const IdAttentionParams* params;
  bool pairs;          // bf16 operands stay bf16 and go through the dot-product instruction
  int64_t chunks;      // ceil(Lq / kChunkRows)
  int64_t padded_dim;  // D rounded up to whole vectors
  int64_t row_floats;  // floats per thread for a block of rows: queries and scores
  Packed k[kMaxBranches];
  Packed v[kMaxBranches];
  // Only for ortho and ortho_v2, else null. Between the passes h = text attention and u = h + sum s w i wait,
  // h in `text` and u in the result, in the dtype of out; for few rows of a 16-bit call both wait in float32,
  // because there u and alpha h may cancel (one row: exactly) and their rounding would be all that is left.
  void* text;    // [B, chunks, H, kChunkRows, padded_dim], dtype of out, or float32 where `mixed` is there
  float* mixed;  // u, as `text`; null: u waits in the result
  float* share;  // what the first num_global tokens get, per head (ortho_v2). [n, B, H, chunks * kChunkRows]
  float* sums;   // per work item sum w h i and sum w h h. [B, chunks, H, n, 2, padded_dim]
  float* alpha;  // [B, n, H, padded_dim]
  IdAttentionStats stats;  // what backward will want; all null where nothing will
};

struct Kernels {
  const char* name;
  int64_t lanes;
  bool has_pairs;
  // Words of one head of packed K or V, with the slack that vector stores may run into.
  int64_t (*packed_k_words)(int64_t length, int64_t head_dim, bool pairs);
  int64_t (*packed_v_words)(int64_t length, int64_t head_dim, bool pairs);
  int64_t (*row_floats)(int64_t keys, int64_t head_dim);
  void (*pack_k)(const Plan& plan, int branch, int64_t batch, int64_t head);
  void (*pack_v)(const Plan& plan, int branch, int64_t batch, int64_t head);
  // Attention of one chunk of rows in one head; for "add" the result, else `text`, `share`, `sums` and text +
  // s w i.
  void (*attend)(const Plan& plan, int64_t batch, int64_t chunk, int64_t head, float* scratch);
  // The second pass of ortho and ortho_v2: adds what depends on sums over all rows.
  void (*finish)(const Plan& plan, int64_t batch, int64_t chunk);
  // Runs `rounds` of independent multiply-adds in registers (with `pairs` the bf16 dot product) and returns
  // the floating-point operations done.
  double (*multiply_adds)(int64_t rounds, bool pairs);
};

const Kernels* kernels_base();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512bf16();

}  // namespace cpu
}  // namespace idcore
