// Head dims 128 and 160.
#include "cuda/id_attention_launch.cuh"

namespace idcore {
namespace cuda {

Launcher launcher_128() { return launcher<128>(); }
Launcher launcher_160() { return launcher<160>(); }

}  // namespace cuda
}  // namespace idcore
