// Head dims 128 and 160.
#include "cuda/id_attention_launch.cuh"

namespace idcore {
namespace cuda {

cudaError_t launch_attend_128(const Task& task, const Sizes& s, cudaStream_t stream) {
  return launch_attend<128>(task, s, stream);
}
cudaError_t launch_attend_160(const Task& task, const Sizes& s, cudaStream_t stream) {
  return launch_attend<160>(task, s, stream);
}

}  // namespace cuda
}  // namespace idcore
