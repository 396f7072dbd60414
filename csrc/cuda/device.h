// What CUDA devices there are. Safe to call without a driver.
#pragma once

namespace idcore {
namespace cuda {

struct DeviceInfo {
  char name[256];
  int major, minor;
  int multiprocessors;
  long long memory_bytes;
};

// Devices that can be used; 0 both without a driver and without a device. Other failures give their CUDA
// error in `error` (else 0) and its text in `text` (else null).
int device_count(int* error, const char** text);
// False when the device cannot be asked.
bool device_info(int index, DeviceInfo* info);

}  // namespace cuda
}  // namespace idcore
