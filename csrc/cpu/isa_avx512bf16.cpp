// AVX-512 with the bf16 dot product: bf16 calls keep q, K, V and the probabilities as bf16, sums are float32.
#define IDC_PAIRS 1
#include "cpu/vec_avx512.h"

#include "cpu/vec_avx512bf16.h"

#include "cpu/tile_table.h"

namespace idcore {
namespace cpu {

const Kernels* kernels_avx512bf16() {
  static constexpr Kernels kTable = table("avx512bf16", true);
  return &kTable;
}

}  // namespace cpu
}  // namespace idcore
