// `align_face` on a CUDA device.
#pragma once

#include "align_face.h"

namespace idcore {
namespace cuda {

// Enqueues one kernel on `stream` (a cudaStream_t) of the current device; allocates nothing, waits for
// nothing, reads matrices and picture_of when it runs. Returns 0, or a cudaError_t (text: error_text).
int align_face(const AlignFaceParams& params, void* stream);

}  // namespace cuda
}  // namespace idcore
