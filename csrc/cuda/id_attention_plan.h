// How one call of `id_attention` is cut into blocks and what scratch memory it needs. Host code, no CUDA
// header.
#pragma once

#include <cstdint>

#include "id_attention.h"

namespace idcore {
namespace cuda {

struct Sizes {
  int32_t warps;   // of a block of attend_kernel
  int32_t blocks;  // of it along the rows
  int64_t text_bytes, share_bytes, sums_bytes;
  int64_t total() const { return text_bytes + share_bytes + sums_bytes; }
};

inline int64_t round_up_256(int64_t bytes) { return (bytes + 255) / 256 * 256; }

inline bool two_passes(const IdAttentionParams& p) { return p.merge != Merge::kAdd && p.num_identities > 0; }

// Most warps a block of attend_kernel has. Two passes need more registers a thread; with six warps two blocks
// of head dim 64 still fit on a multiprocessor, and nothing spills.
constexpr int max_warps(bool two) { return two ? 6 : 8; }

// Many warps a block save reads of K and V; fewer where the call is too small to fill the GPU with such
// blocks. `warps` forces it, 0 chooses.
inline Sizes sizes_of(const IdAttentionParams& p, int32_t warps, int32_t multiprocessors) {
  Sizes s{};
  s.warps = warps;
  if (warps == 0) {
    s.warps = max_warps(two_passes(p));
    while (s.warps > 1 &&
           (p.lq + s.warps * 16 - 1) / (s.warps * 16) * p.heads * p.batch < 2 * multiprocessors)
      s.warps /= 2;
  }
  s.blocks = static_cast<int32_t>((p.lq + s.warps * 16 - 1) / (s.warps * 16));
  if (!two_passes(p)) return s;
  const int64_t heads = p.batch * p.heads;
  s.text_bytes = round_up_256(2 * heads * p.lq * p.head_dim);
  s.share_bytes = p.merge == Merge::kOrthoV2 ? round_up_256(4 * p.num_identities * heads * p.lq) : 0;
  s.sums_bytes = round_up_256(4 * 2 * s.blocks * p.num_identities * heads * p.head_dim);
  return s;
}

inline bool aligned16(const HeadTensor& t) {
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.stride_batch % 8 == 0 && t.stride_head % 8 == 0 &&
         t.stride_row % 8 == 0;
}

// True where all rows of q, K, V and out start at multiples of 16 bytes.
inline bool all_aligned(const IdAttentionParams& p) {
  bool all = aligned16(p.q) && aligned16(p.k_text) && aligned16(p.v_text) && aligned16(p.out);
  for (int j = 0; j < p.num_identities; ++j)
    all = all && aligned16(p.identity[j].k) && aligned16(p.identity[j].v);
  return all;
}

}  // namespace cuda
}  // namespace idcore
