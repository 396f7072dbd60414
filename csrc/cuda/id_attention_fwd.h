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
// device, aligned to 256, not used by another stream meanwhile. Returns 0, or a cudaError_t.
int id_attention_fwd(const IdAttentionParams& p, void* workspace, void* stream);

// Text of a cudaError_t.
const char* error_text(int error);

}  // namespace cuda
}  // namespace idcore
