// Head dims 40, 64 and 80.
#include "cuda/id_attention_launch.cuh"

namespace idcore {
namespace cuda {

Launcher launcher_40() { return launcher<40>(); }
Launcher launcher_64() { return launcher<64>(); }
Launcher launcher_80() { return launcher<80>(); }

}  // namespace cuda
}  // namespace idcore
