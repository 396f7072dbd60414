// Door of the forward, and its second kernel.
#include "cuda/id_attention_fwd.h"

#include "cuda/id_attention_launch.cuh"
#include "cuda/id_attention_merge.cuh"

namespace idcore {
namespace cuda {
namespace {

constexpr int kMergeThreads = 128;

template <class T>
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const __grid_constant__ Task task) {
  merge_rows<T>(task);
}

// Of the current device; without one, the least that sm_80 and newer have.
Limits device_limits() {
  Limits limits{0, 99 * 1024};
  int device = 0;
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  return limits;
}

cudaError_t launch_first(const Task& task, const Sizes& s, cudaStream_t stream) {
  switch (task.p.head_dim) {
    case 40:
      return launch_attend_40(task, s, stream);
    case 64:
      return launch_attend_64(task, s, stream);
    case 80:
      return launch_attend_80(task, s, stream);
    case 128:
      return launch_attend_128(task, s, stream);
    case 160:
      return launch_attend_160(task, s, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t launch_merge(const Task& task, cudaStream_t stream) {
  const IdAttentionParams& p = task.p;
  const dim3 grid(static_cast<unsigned>((p.lq + kMergeRows - 1) / kMergeRows), static_cast<unsigned>(p.heads),
                  static_cast<unsigned>(p.batch));
  const size_t bytes = 4 * p.num_identities * (p.head_dim + kMergeRows);
  if (p.dtype == DType::kFloat16) {
    merge_kernel<Half><<<grid, kMergeThreads, bytes, stream>>>(task);
  } else {
    merge_kernel<BFloat16><<<grid, kMergeThreads, bytes, stream>>>(task);
  }
  return cudaGetLastError();
}

}  // namespace

const char* id_attention_refusal(const IdAttentionParams& p) {
  if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) return "dtype is not float16 or bfloat16";
  if (p.head_dim != 40 && p.head_dim != 64 && p.head_dim != 80 && p.head_dim != 128 && p.head_dim != 160)
    return "head_dim is not 40, 64, 80, 128 or 160";
  if (p.num_identities > kMaxIdentities) return "more than 16 identities";
  if (p.heads > 65535 || p.batch > 65535) return "more than 65535 heads or samples";
  if (p.lq > (int64_t{1} << 30) || p.lt > (int64_t{1} << 30)) return "more than 2^30 tokens";
  return nullptr;
}

int64_t id_attention_workspace(const IdAttentionParams& p) { return sizes_of(p, 0, device_limits()).total(); }

int id_attention_fwd(const IdAttentionParams& p, void* workspace, void* stream) {
  if (id_attention_refusal(p)) return cudaErrorInvalidValue;
  if (p.batch == 0 || p.heads == 0 || p.lq == 0) return cudaSuccess;
  const Sizes s = sizes_of(p, 0, device_limits());
  unsigned char* const scratch = static_cast<unsigned char*>(workspace);
  Task task{};
  task.p = p;
  task.text = reinterpret_cast<uint16_t*>(scratch);
  task.share = reinterpret_cast<float*>(scratch + s.text_bytes);
  task.sums = reinterpret_cast<float*>(scratch + s.text_bytes + s.share_bytes);
  task.blocks = s.blocks;
  task.aligned = all_aligned(p);
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  cudaError_t e = launch_first(task, s, on);
  if (e == cudaSuccess && two_passes(p)) e = launch_merge(task, on);
  return e;
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace cuda
}  // namespace idcore
