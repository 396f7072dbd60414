// The CPU backward of `id_attention`.
#pragma once

#include "cpu/kernels_bwd.h"

namespace idcore {
namespace cpu {

// Gradients of a call whose forward wrote `stats`. Deterministic: the same bits for any number of threads.
// Shapes must have been checked. Throws std::bad_alloc.
void id_attention_bwd(const IdAttentionParams& params, const IdAttentionStats& stats,
                      const IdAttentionGrads& grads, const Kernels& kernels);

}  // namespace cpu
}  // namespace idcore
