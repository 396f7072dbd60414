// Forward of `id_attention` on a CUDA device: float16 and bfloat16, head dims 40, 64, 80, 128, 160.
#pragma once

#include "id_attention.h"

namespace idcore {
namespace cuda {

// Null, or why the kernels cannot run this call (a static text).
const char* id_attention_refusal(const IdAttentionParams& p);

// Bytes of scratch memory, a multiple of 256 (0 for "add"), and kernels enqueued by a call on the current
// device: 1 for "add"; 1 for ortho and ortho_v2 where the grid fits the device at once, else 2.
struct Plan {
  int64_t workspace;
  int launches;
};
Plan id_attention_plan(const IdAttentionParams& p);

// Enqueues the kernels on `stream` (a cudaStream_t) of the current device; allocates nothing, waits for
// nothing, and may be captured in a CUDA graph. `workspace`: id_attention_plan(p).workspace bytes on the
// device, aligned to 256, not used by another stream meanwhile. Returns 0, a cudaError_t, or kPlanAgain:
// nothing was enqueued, and the plan is another one now.
constexpr int kPlanAgain = -1;
int id_attention_fwd(const IdAttentionParams& p, void* workspace, int64_t workspace_bytes, void* stream);

// Whether ortho may be one launch where it fits; returns what was so before. The kernels themselves say no
// once a device has refused such a launch.
bool id_attention_together(bool allowed);

// 0, or the cudaError_t that says why no kernel of this build runs on the current device (an older driver, no
// code for its architecture).
int id_attention_problem();

// Text of a cudaError_t.
const char* error_text(int error);

}  // namespace cuda
}  // namespace idcore
