// Launches attend_kernel for one head dim. One .cu per group of head dims includes this, so that they build
// in parallel.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/id_attention_attend.cuh"
#include "cuda/id_attention_plan.h"

namespace idcore {
namespace cuda {

template <class T, int kHeadDim, bool kTwo>
__global__ void __launch_bounds__(32 * max_warps(kTwo), kHeadDim <= 64 ? 2 : 1)
    attend_kernel(const __grid_constant__ Task task) {
  attend_rows<T, kHeadDim, kTwo>(task);
}

template <class T, int kHeadDim, bool kTwo>
cudaError_t launch_attend_as(const Task& task, const Sizes& s, cudaStream_t stream) {
  static_assert(Geometry<kHeadDim>::shared_bytes(5) == attend_shared_bytes(kHeadDim, 5),
                "one of them is stale");
  const IdAttentionParams& p = task.p;
  const auto kernel = attend_kernel<T, kHeadDim, kTwo>;
  const int bytes = static_cast<int>(Geometry<kHeadDim>::shared_bytes(s.warps));
  const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (e != cudaSuccess) return e;
  const dim3 grid(s.blocks, static_cast<unsigned>(p.heads), static_cast<unsigned>(p.batch));
  kernel<<<grid, 32 * s.warps, bytes, stream>>>(task);
  return cudaGetLastError();
}

template <int kHeadDim>
cudaError_t launch_attend(const Task& task, const Sizes& s, cudaStream_t stream) {
  const bool two = two_passes(task.p);
  if (task.p.dtype == DType::kFloat16)
    return two ? launch_attend_as<Half, kHeadDim, true>(task, s, stream)
               : launch_attend_as<Half, kHeadDim, false>(task, s, stream);
  return two ? launch_attend_as<BFloat16, kHeadDim, true>(task, s, stream)
             : launch_attend_as<BFloat16, kHeadDim, false>(task, s, stream);
}

// Defined in id_attention_d*.cu.
cudaError_t launch_attend_40(const Task& task, const Sizes& s, cudaStream_t stream);
cudaError_t launch_attend_64(const Task& task, const Sizes& s, cudaStream_t stream);
cudaError_t launch_attend_80(const Task& task, const Sizes& s, cudaStream_t stream);
cudaError_t launch_attend_128(const Task& task, const Sizes& s, cudaStream_t stream);
cudaError_t launch_attend_160(const Task& task, const Sizes& s, cudaStream_t stream);

}  // namespace cuda
}  // namespace idcore
