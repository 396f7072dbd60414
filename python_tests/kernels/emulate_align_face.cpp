// Runs the CUDA kernel of align_face on the host; see csrc/cuda/emulate.h. Loaded by
// test_align_face_emulated.py.
#define IDCORE_EMULATE
#include <cstring>

#include "cuda/align_face.cuh"

using namespace idcore;
using namespace idcore::cuda;

namespace {
char message[256];
}  // namespace

extern "C" int64_t params_bytes() { return sizeof(AlignFaceParams); }

// Blocks that read averages from shared memory, counted in `boxes`. Null, or what went wrong.
extern "C" const char* align_face_emulated(const AlignFaceParams* p, uint32_t seed, int* boxes) {
  try {
    const int most = p->filter == ChipFilter::kBicubic ? 2 : 1;
    const int blocks = tiles_of(p->width, most) * tiles_of(p->height, most) * static_cast<int>(p->faces);
    *boxes = 0;
    emulated::launch(blocks, kChipThreads, sizeof(ChipRoom), false, seed, [&] {
      align_block(*p);
      const AverageBox& box = reinterpret_cast<ChipRoom*>(shared_memory())->job.box;
      if (thread_index() == 0 && box.x0 >= 0 && box.x1 > box.x0 && box.x1 <= box.x0 + kChipAverages) ++*boxes;
    });
    return nullptr;
  } catch (const std::exception& e) {
    std::strncpy(message, e.what(), sizeof(message) - 1);
    return message;
  }
}
