// Launches attend_kernel for one head dim. One .cu per group of head dims includes this, so that they build
// in parallel.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/id_attention_attend.cuh"
#include "cuda/id_attention_plan.h"

namespace idcore {
namespace cuda {

template <class T, int kHeadDim, bool kTwo>
__global__ void __launch_bounds__(32 * max_warps(kHeadDim, kTwo), blocks_per_multiprocessor(kHeadDim, kTwo))
    attend_kernel(const __grid_constant__ Task task) {
  attend<T, kHeadDim, kTwo>(task);
}

// What one head dim's kernels can do.
struct Launcher {
  cudaError_t (*launch)(const Task& task, const Sizes& s, cudaStream_t stream);
  // Blocks of the plan that one multiprocessor holds at once; 0 where the device cannot say.
  int (*resident)(const IdAttentionParams& p, const Sizes& s);
};

using AttendKernel = void (*)(Task);

template <int kHeadDim>
AttendKernel attend_kernel_of(const IdAttentionParams& p) {
  const bool two = two_passes(p);
  if (p.dtype == DType::kFloat16)
    return two ? attend_kernel<Half, kHeadDim, true> : attend_kernel<Half, kHeadDim, false>;
  return two ? attend_kernel<BFloat16, kHeadDim, true> : attend_kernel<BFloat16, kHeadDim, false>;
}

// A launch may take all shared memory that the device has for a block, not only what this call needs: else
// another thread's smaller call would lower the limit between this one's setting and its launch.
inline cudaError_t allow_shared(AttendKernel kernel, int wanted) {
  int device = 0, most = 0;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (e != cudaSuccess) return e;
  e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (e != cudaErrorInvalidValue) return e;
  (void)cudaGetLastError();  // where a part of it is not the kernel's to take
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, wanted);
}

template <int kHeadDim>
cudaError_t launch_attend(const Task& task, const Sizes& s, cudaStream_t stream) {
  static_assert(Geometry<kHeadDim>::kSlotBytes == slot_bytes(kHeadDim, 1), "one of them is stale");
  static_assert(2 * kStages * Geometry<kHeadDim>::kStageElements == stage_bytes(kHeadDim),
                "one of them is stale");
  const AttendKernel kernel = attend_kernel_of<kHeadDim>(task.p);
  const cudaError_t e = allow_shared(kernel, s.shared_bytes);
  if (e != cudaSuccess) return e;
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(s.grid));
  config.blockDim = dim3(static_cast<unsigned>(32 * s.warps));
  config.dynamicSmemBytes = static_cast<size_t>(s.shared_bytes);
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = s.together ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, task);
}

template <int kHeadDim>
int resident_attend(const IdAttentionParams& p, const Sizes& s) {
  const AttendKernel kernel = attend_kernel_of<kHeadDim>(p);
  int blocks = 0;
  if (allow_shared(kernel, s.shared_bytes) != cudaSuccess ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, 32 * s.warps,
                                                    static_cast<size_t>(s.shared_bytes)) != cudaSuccess) {
    (void)cudaGetLastError();
    return 0;
  }
  return blocks;
}

template <int kHeadDim>
Launcher launcher() {
  return {&launch_attend<kHeadDim>, &resident_attend<kHeadDim>};
}

// Defined in id_attention_small.cu and id_attention_large.cu.
Launcher launcher_40();
Launcher launcher_64();
Launcher launcher_80();
Launcher launcher_128();
Launcher launcher_160();

}  // namespace cuda
}  // namespace idcore
