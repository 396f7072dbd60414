// Head dims 40, 64 and 80.
#include "cuda/id_attention_launch.cuh"

namespace idcore {
namespace cuda {

cudaError_t launch_attend_40(const Task& task, const Sizes& s, cudaStream_t stream) {
  return launch_attend<40>(task, s, stream);
}
cudaError_t launch_attend_64(const Task& task, const Sizes& s, cudaStream_t stream) {
  return launch_attend<64>(task, s, stream);
}
cudaError_t launch_attend_80(const Task& task, const Sizes& s, cudaStream_t stream) {
  return launch_attend<80>(task, s, stream);
}

}  // namespace cuda
}  // namespace idcore
