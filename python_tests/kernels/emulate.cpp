// Runs the CUDA kernels of id_attention on the host; see csrc/cuda/emulate.h. Loaded by
// test_cuda_emulated.py.
#define IDCORE_EMULATE
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
  const int64_t bytes = Geometry<kHeadDim>::shared_bytes(s.warps);
  emulated::launch(s.blocks, p.heads, p.batch, 32 * s.warps, bytes, seed, [&] {
    if (two) {
      attend_rows<T, kHeadDim, true>(task);
    } else {
      attend_rows<T, kHeadDim, false>(task);
    }
  });
  if (!two) return;
  const int blocks = static_cast<int>((p.lq + kMergeRows - 1) / kMergeRows);
  const int64_t merge_bytes = 4 * p.num_identities * (p.head_dim + kMergeRows);
  emulated::launch(blocks, p.heads, p.batch, 128, merge_bytes, seed, [&] { merge_rows<T>(task); });
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

// Warps of a block on a GPU with these limits, and whether its shared memory suffices.
extern "C" int planned_warps(const IdAttentionParams* p, int multiprocessors, int shared_bytes) {
  const Sizes s = sizes_of(*p, 0, {multiprocessors, shared_bytes});
  return attend_shared_bytes(p->head_dim, s.warps) <= shared_bytes ? s.warps : -1;
}

// Null, or what went wrong.
extern "C" const char* id_attention_emulated(const IdAttentionParams* p, int warps, uint32_t seed) {
  try {
    const Sizes s = sizes_of(*p, warps, {132, 227 * 1024});
    std::vector<unsigned char> workspace(s.total() + 1, 0xff);
    Task task{};
    task.p = *p;
    task.text = reinterpret_cast<uint16_t*>(workspace.data());
    task.share = reinterpret_cast<float*>(workspace.data() + s.text_bytes);
    task.sums = reinterpret_cast<float*>(workspace.data() + s.text_bytes + s.share_bytes);
    task.blocks = s.blocks;
    task.aligned = all_aligned(*p);
    const bool known =
        p->dtype == DType::kFloat16 ? by_head_dim<Half>(task, s, seed) : by_head_dim<BFloat16>(task, s, seed);
    return known ? nullptr : "head_dim not built";
  } catch (const std::exception& e) {
    std::strncpy(message, e.what(), sizeof(message) - 1);
    return message;
  }
}
