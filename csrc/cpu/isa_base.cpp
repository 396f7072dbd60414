#include "cpu/vec_base.h"

#include "cpu/tile_table.h"

namespace idcore {
namespace cpu {

const Kernels* kernels_base() {
  static constexpr Kernels kTable = table("base", false);
  return &kTable;
}

}  // namespace cpu
}  // namespace idcore
