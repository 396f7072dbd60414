// Runs the CUDA kernels of id_attention on the host; see csrc/cuda/emulate.h. Loaded by
// test_cuda_emulated.py.
#define IDCORE_EMULATE
#include <algorithm>

#include "cuda/id_attention_attend.cuh"
#include "cuda/id_attention_merge.cuh"
#include "cuda/id_attention_plan.h"

using namespace idcore;
using namespace idcore::cuda;

namespace {

char message[256];

template <class T, int kHeadDim>
void run(const Task& task, const Sizes& s, uint32_t seed) {
  const IdAttentionParams& p = task.p;
  const bool two = two_passes(p);
  emulated::launch(s.grid, 32 * s.warps, s.shared_bytes, s.together, seed, [&] {
    if (two) {
      attend<T, kHeadDim, true>(task);
    } else {
      attend<T, kHeadDim, false>(task);
    }
  });
  if (!two || s.together) return;
  const int64_t blocks = (p.lq + kMergeRows - 1) / kMergeRows * p.heads * p.batch;
  const int64_t bytes = merging_bytes(p.num_identities, p.head_dim, kMergeRows, 128);
  emulated::launch(static_cast<int>(blocks), 128, bytes, false, seed, [&] { merge_block<T>(task); });
}

template <class T>
bool by_head_dim(const Task& task, const Sizes& s, uint32_t seed) {
  switch (task.p.head_dim) {
    case 40:
      return run<T, 40>(task, s, seed), true;
    case 64:
      return run<T, 64>(task, s, seed), true;
    case 80:
      return run<T, 80>(task, s, seed), true;
    case 128:
      return run<T, 128>(task, s, seed), true;
    case 160:
      return run<T, 160>(task, s, seed), true;
    default:
      return false;
  }
}

}  // namespace

extern "C" int64_t params_bytes() { return sizeof(IdAttentionParams); }

// The plan for a GPU with these limits that holds `resident` blocks at once.
// got: warps, grid, slots, together, bytes of shared memory, bytes of scratch
extern "C" void planned(const IdAttentionParams* p, const Limits* limits, int64_t resident, int64_t* got) {
  const Sizes s = plan(*p, *limits, [&](const Sizes&) { return resident; });
  const int64_t all[] = {s.warps, s.grid, s.slots, s.together, s.shared_bytes, s.total()};
  std::copy(all, all + 6, got);
}

// grid 0: two launches. Null, or what went wrong.
extern "C" const char* id_attention_emulated(const IdAttentionParams* p, int warps, int grid, int slots,
                                             uint32_t seed) {
  try {
    const Sizes s = complete(*p, warps, grid, grid ? slots : 1, grid != 0);
    std::vector<unsigned char> workspace(s.total() + 256, 0xff);
    const uintptr_t start = (reinterpret_cast<uintptr_t>(workspace.data()) + 255) / 256 * 256;
    const Task task = task_of(*p, s, reinterpret_cast<void*>(start));
    const bool known =
        p->dtype == DType::kFloat16 ? by_head_dim<Half>(task, s, seed) : by_head_dim<BFloat16>(task, s, seed);
    return known ? nullptr : "head_dim not built";
  } catch (const std::exception& e) {
    std::strncpy(message, e.what(), sizeof(message) - 1);
    return message;
  }
}
