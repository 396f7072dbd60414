// AMX: as AVX-512 with the bf16 dot product; the products of bf16 calls whose head dim is a multiple of 32 go
// through tiles.
#define IDC_PAIRS 1
#define IDC_TILES 1
#include "cpu/vec_avx512.h"

#include "cpu/vec_avx512bf16.h"

#include "cpu/tiles.h"

#include "cpu/tile_table.h"

namespace idcore {
namespace cpu {

const Kernels* kernels_amx() {
  static constexpr Kernels kTable = table("amx", true);
  return &kTable;
}

}  // namespace cpu
}  // namespace idcore
