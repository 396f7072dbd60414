#include "cpu/vec_avx2.h"

#include "cpu/tile_table.h"

namespace idcore {
namespace cpu {

const Kernels* kernels_avx2() {
  static constexpr Kernels kTable = table("avx2", false);
  return &kTable;
}

}  // namespace cpu
}  // namespace idcore
