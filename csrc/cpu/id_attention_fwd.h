// The CPU forward of `id_attention`.
#pragma once

#include "cpu/kernels.h"

namespace idcore {
namespace cpu {

// Runs the call on OpenMP's threads with the kernels of one instruction set. Shapes must have been checked.
// Deterministic: the same bits for any number of threads. `stats`: what backward will want. Throws
// std::bad_alloc.
void id_attention_fwd(const IdAttentionParams& params, const Kernels& kernels,
                      const IdAttentionStats& stats = {});

// Multiply-add rate (with `pairs` of its bf16 dot product) that the instruction set reaches in registers, in
// GFLOP/s, over `threads` threads (0: all).
double measure_peak(const Kernels& kernels, int threads, double seconds, bool pairs);

bool has_openmp();
int max_threads();

}  // namespace cpu
}  // namespace idcore
