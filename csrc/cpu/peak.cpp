#include <time.h>

#include "cpu/id_attention_fwd.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace idcore {
namespace cpu {
namespace {

// Seconds that this thread has run: other programs on the machine do not count.
double thread_seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

}  // namespace

bool has_openmp() {
#if defined(_OPENMP)
  return true;
#else
  return false;
#endif
}

int max_threads() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

double measure_peak(const Kernels& kernels, int threads, double seconds, bool pairs) {
  const int count = threads > 0 ? threads : max_threads();
  double rate = 0.0;
#pragma omp parallel num_threads(count) reduction(+ : rate)
  {
    kernels.multiply_adds(1 << 16, pairs);  // until the clock has settled
    const double start = thread_seconds();
    double flops = 0.0, elapsed = 0.0;
    while (elapsed < seconds) {
      flops += kernels.multiply_adds(1 << 14, pairs);
      elapsed = thread_seconds() - start;
    }
    rate += flops / elapsed * 1e-9;
  }
  return rate;
}

}  // namespace cpu
}  // namespace idcore
