#include <chrono>

#include "cpu/id_attention_fwd.h"

namespace idcore {
namespace cpu {

double measure_peak(const Kernels& kernels, int threads, double seconds, bool pairs) {
  using Clock = std::chrono::steady_clock;
  const int count = threads > 0 ? threads : max_threads();
  double rate = 0.0;
#pragma omp parallel num_threads(count) reduction(+ : rate)
  {
    kernels.multiply_adds(1 << 16, pairs);  // until the clock has settled
    const auto start = Clock::now();
    double flops = 0.0, elapsed = 0.0;
    while (elapsed < seconds) {
      flops += kernels.multiply_adds(1 << 14, pairs);
      elapsed = std::chrono::duration<double>(Clock::now() - start).count();
    }
    rate += flops / elapsed * 1e-9;
  }
  return rate;
}

}  // namespace cpu
}  // namespace idcore
