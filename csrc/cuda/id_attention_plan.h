// How one call of `id_attention` is cut into blocks and what scratch memory it needs. Host code, no CUDA
// header.
#pragma once

#include <cstdint>

#include "id_attention.h"

namespace idcore {
namespace cuda {

struct Limits {
  int32_t multiprocessors;
  int32_t shared_bytes;  // of one block, at most
};

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

// Shared memory of a block of attend_kernel: two stages of 32 keys and values, then of each warp its rows,
// its running result and its part of the sums.
constexpr int64_t attend_shared_bytes(int64_t head_dim, int64_t warps) {
  const int64_t pitch = (head_dim + 15) / 16 * 16 + 8;
  return 2 * (2 * 2 * 32 * pitch + warps * 16 * pitch) + 4 * warps * (16 * head_dim + 2 * head_dim);
}

// Many warps a block save reads of K and V; fewer where the call is too small to fill the GPU with such
// blocks, or where shared memory is short (99 KB on sm_89). `warps` forces it, 0 chooses.
inline Sizes sizes_of(const IdAttentionParams& p, int32_t warps, const Limits& limits) {
  Sizes s{};
  s.warps = warps;
  if (warps == 0) {
    s.warps = max_warps(two_passes(p));
    while (s.warps > 1 &&
           (p.lq + s.warps * 16 - 1) / (s.warps * 16) * p.heads * p.batch < 2 * limits.multiprocessors)
      s.warps /= 2;
    while (s.warps > 1 && attend_shared_bytes(p.head_dim, s.warps) > limits.shared_bytes) --s.warps;
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
