// Door of the forward, and its second kernel.
#include "cuda/id_attention_fwd.h"

#include <atomic>

#include "cuda/id_attention_launch.cuh"
#include "cuda/id_attention_merge.cuh"

namespace idcore {
namespace cuda {
namespace {

constexpr int kMergeThreads = 128;
static_assert(merging_bytes(kMaxIdentities, 160, kMergeRows, kMergeThreads) <= 48 * 1024,
              "more than a block gets without asking");

// False once the device has refused one launch whose plan the occupancy calculation had let pass, as under
// MPS, in a part of the GPU, or with an instrumented kernel.
std::atomic<bool> g_together{true};

template <class T>
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const __grid_constant__ Task task) {
  merge_block<T>(task);
}

// Of the current device; without one, the least that sm_80 and newer have.
Limits device_limits() {
  Limits limits{0, 99 * 1024, 100 * 1024, false};
  int device = 0, cooperative = 0;
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&limits.shared_all, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device);
    limits.cooperative = cooperative != 0 && g_together.load(std::memory_order_relaxed);
  }
  return limits;
}

Launcher launcher_of(int64_t head_dim) {
  switch (head_dim) {
    case 40:
      return launcher_40();
    case 64:
      return launcher_64();
    case 80:
      return launcher_80();
    case 128:
      return launcher_128();
    default:
      return launcher_160();
  }
}

Sizes sizes_of(const IdAttentionParams& p) {
  const Limits limits = device_limits();
  return plan(p, limits, [&](const Sizes& s) {
    return launcher_of(p.head_dim).resident(p, s) * static_cast<int64_t>(limits.multiprocessors);
  });
}

cudaError_t launch_merge(const Task& task, cudaStream_t stream) {
  const IdAttentionParams& p = task.p;
  const int64_t blocks = (p.lq + kMergeRows - 1) / kMergeRows * p.heads * p.batch;
  const size_t bytes = merging_bytes(p.num_identities, p.head_dim, kMergeRows, kMergeThreads);
  if (p.dtype == DType::kFloat16) {
    merge_kernel<Half><<<static_cast<unsigned>(blocks), kMergeThreads, bytes, stream>>>(task);
  } else {
    merge_kernel<BFloat16><<<static_cast<unsigned>(blocks), kMergeThreads, bytes, stream>>>(task);
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
  if (chunks_of(p, 1) * p.heads * p.batch > INT32_MAX)
    return "more than 2^31 - 1 blocks of 16 rows of a head";
  return nullptr;
}

Plan id_attention_plan(const IdAttentionParams& p) {
  if (id_attention_refusal(p) || p.batch == 0 || p.heads == 0 || p.lq == 0) return {0, 0};
  const Sizes s = sizes_of(p);
  return {s.total(), two_passes(p) && !s.together ? 2 : 1};
}

int id_attention_fwd(const IdAttentionParams& p, void* workspace, int64_t workspace_bytes, void* stream) {
  if (id_attention_refusal(p)) return cudaErrorInvalidValue;
  if (p.batch == 0 || p.heads == 0 || p.lq == 0) return cudaSuccess;
  const Sizes s = sizes_of(p);
  if (s.total() > workspace_bytes) return kPlanAgain;
  const Task task = task_of(p, s, workspace);
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  cudaError_t e = launcher_of(p.head_dim).launch(task, s, on);
  if (e == cudaSuccess && two_passes(p) && !s.together) e = launch_merge(task, on);
  if (e == cudaSuccess) return e;
  (void)cudaGetLastError();  // or the next launch would be told of it again
  if (e != cudaErrorCooperativeLaunchTooLarge || !s.together) return e;
  g_together.store(false, std::memory_order_relaxed);
  return kPlanAgain;
}

bool id_attention_together(bool allowed) { return g_together.exchange(allowed); }

int id_attention_problem() {
  cudaFuncAttributes attributes;
  const cudaError_t e = cudaFuncGetAttributes(&attributes, merge_kernel<Half>);
  (void)cudaGetLastError();
  return e;
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace cuda
}  // namespace idcore
