// Launch of `align_face`. Compiled without contraction into fused multiply-adds, so that positions and pixels
// are the same bits as on the host.
#include "cuda/align_face.cuh"

#include <cuda_runtime_api.h>

#include "cuda/align_face_launch.h"

namespace idcore {
namespace cuda {
namespace {

__global__ void __launch_bounds__(kChipThreads, 2) align_kernel(const __grid_constant__ AlignFaceParams p) {
  align_block(p);
}

}  // namespace

int align_face(const AlignFaceParams& p, void* stream) {
  if (p.faces == 0 || p.height == 0 || p.width == 0) return cudaSuccess;
  const int64_t most = p.filter == ChipFilter::kBicubic ? 2 : 1;
  const int64_t across = (p.width * most + kChipSide - 1) / kChipSide;
  const int64_t down = (p.height * most + kChipSide - 1) / kChipSide;
  if (across > INT32_MAX / down || across * down > INT32_MAX / p.faces) return cudaErrorInvalidValue;
  const unsigned blocks = static_cast<unsigned>(across * down * p.faces);
  static_assert(sizeof(ChipRoom) <= 48 * 1024, "more than a block gets without asking");
  align_kernel<<<blocks, kChipThreads, sizeof(ChipRoom), static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace idcore
