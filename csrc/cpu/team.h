// How many threads work on a call, and which one this is.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace idcore {
namespace cpu {

// One, or all that PyTorch's loops have, even where some find nothing to do: of a smaller team GNU OpenMP
// ends the threads that are left out, and the next full team, PyTorch's next loop, has to start them anew.
inline int team_size(int64_t work, int64_t least) {
#if defined(_OPENMP)
  return work < least || omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  (void)work, (void)least;
  return 1;
#endif
}

inline int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace cpu
}  // namespace idcore
