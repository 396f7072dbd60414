#include "cuda/device.h"

#include <cuda_runtime_api.h>

#include <cstring>

namespace idcore {
namespace cuda {

int device_count(int* error, const char** text) {
  int count = 0;
  const cudaError_t e = cudaGetDeviceCount(&count);
  *error = 0;
  *text = nullptr;
  if (e == cudaSuccess) return count;
  (void)cudaGetLastError();
  // Without a driver the runtime says "driver too old" (35), with a driver and no GPU "no device" (100).
  if (e != cudaErrorInsufficientDriver && e != cudaErrorNoDevice) {
    *error = static_cast<int>(e);
    *text = cudaGetErrorString(e);
  }
  return 0;
}

bool device_info(int index, DeviceInfo* info) {
  cudaDeviceProp prop;
  if (cudaGetDeviceProperties(&prop, index) != cudaSuccess) {
    (void)cudaGetLastError();
    return false;
  }
  std::memset(info, 0, sizeof(*info));
  std::strncpy(info->name, prop.name, sizeof(info->name) - 1);
  info->major = prop.major;
  info->minor = prop.minor;
  info->multiprocessors = prop.multiProcessorCount;
  info->memory_bytes = static_cast<long long>(prop.totalGlobalMem);
  return true;
}

}  // namespace cuda
}  // namespace idcore
