#include "cpu/vec_avx512.h"

#include "cpu/tile_table.h"

namespace idcore {
namespace cpu {

const Kernels* kernels_avx512() {
  static constexpr Kernels kTable = table("avx512", false);
  return &kTable;
}

}  // namespace cpu
}  // namespace idcore
