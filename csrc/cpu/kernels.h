// What an instruction-set unit offers to the driver, and the plan of a call that the driver hands to it.
#pragma once

#include <cstdint>

#include "id_attention_grad.h"

namespace idcore {
namespace cpu {

// Image rows of one work item. Fixed, so that sums over rows are added in one order whatever the threads.
constexpr int64_t kChunkRows = 128;
// 16-bit calls with at most so many rows keep h and u in float32 between the passes of ortho (our choice).
constexpr int64_t kFewRows = 256;
// Branch 0 is the text, branch j + 1 is identity j.
constexpr int kMaxBranches = 1 + kMaxIdentities;

// One head of one sample, with K and V of all branches in the order of the inner loops: float32, or pairs of
// bf16 in one 32-bit word. Each thread packs what it works on for itself: lines that another core has written
// cost more.
struct Head {
  int64_t batch, head;
  float* k[kMaxBranches];
  float* v[kMaxBranches];
};

// What one chunk of a head leaves behind in the first pass of ortho and ortho_v2: h = text attention, here,
// and u = h + sum s w i, in the result, both in the dtype of out. For few rows of a 16-bit call both wait
// here in float32, because there u and alpha h may cancel (one row: exactly) and their rounding would be all
// that is left.
struct Waiting {
  void* text;    // [kChunkRows, padded_dim], dtype of out, or float32 where `mixed` is there
  float* mixed;  // u, as `text`; null: u waits in the result
  float* sums;   // sum w h i and sum w h h over the chunk's rows. [n, 2, padded_dim]
};

struct Plan {
  const IdAttentionParams* params;
  bool pairs;          // bf16 operands stay bf16 and go through the dot-product instruction
  int64_t chunks;      // ceil(Lq / kChunkRows)
  int64_t padded_dim;  // D rounded up to whole vectors
  int64_t row_floats;  // floats per thread for a block of rows: queries and scores
  // Only for ortho_v2, else null: what the first num_global tokens get, per head, and `a`, its mean over
  // heads.
  float* share;            // [n, B, H, chunks * kChunkRows]
  float* mean;             // [n, B, chunks * kChunkRows]
  IdAttentionStats stats;  // what backward will want; all null where nothing will
};

struct BackwardKernels;  // of cpu/kernels_bwd.h
struct ChipTile;         // cpu/align_face_tiles.h

struct Kernels {
  const char* name;
  int64_t lanes;
  bool has_pairs;
  // Words of one head of packed K or V, with the slack that vector stores may run into.
  int64_t (*packed_k_words)(int64_t length, int64_t head_dim, bool pairs);
  int64_t (*packed_v_words)(int64_t length, int64_t head_dim, bool pairs);
  int64_t (*row_floats)(int64_t keys, int64_t head_dim);
  // `rows`: the first key or value of one head.
  void (*pack_k)(const Plan& plan, const char* rows, int64_t row_bytes, int64_t length, float* out);
  void (*pack_v)(const Plan& plan, const char* rows, int64_t row_bytes, int64_t length, float* out);
  // Attention of one chunk of rows in one head: for "add" the result, else u, `share` and what waits.
  void (*attend)(const Plan& plan, const Head& head, int64_t chunk, const Waiting& waiting, float* scratch);
  // The second pass of ortho and ortho_v2: adds what depends on sums over all rows. alpha: [n, padded_dim].
  void (*finish)(const Plan& plan, int64_t batch, int64_t head, int64_t chunk, const Waiting& waiting,
                 const float* alpha);
  // Runs `rounds` of independent multiply-adds in registers (with `pairs` the bf16 dot product) and returns
  // the floating-point operations done.
  double (*multiply_adds)(int64_t rounds, bool pairs);
  const BackwardKernels* backward;
  // One tile of `align_face`.
  void (*chip_tile)(const ChipTile& tile);
  // out = the sum of rows of `elements` each, in float32 and in their order; without a row zeros.
  void (*sum_rows)(DType type, const char* const* rows, int64_t count, int64_t elements, DType out_type,
                   void* out);
};

const Kernels* kernels_base();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512bf16();
const Kernels* kernels_amx();
const Kernels* kernels_amx_emulated();

}  // namespace cpu
}  // namespace idcore
