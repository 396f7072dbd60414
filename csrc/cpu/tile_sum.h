// Sums of rows, for the backward of `stage_tokens`.
#pragma once

#include "cpu/tile_finish.h"

namespace idcore {
namespace cpu {
namespace {

template <DType kType>
IDC_NOINLINE void sum_rows_of(const char* const* rows, int64_t count, int64_t elements, DType out_type,
                              void* out) {
  for (int64_t d = 0; d < elements; d += kLanes) {
    const int64_t n = smaller(elements - d, kLanes);
    V sum = count == 0 ? zero() : load_typed(kType, rows[0], d, n);
    for (int64_t r = 1; r < count; ++r) sum = add(sum, load_typed(kType, rows[r], d, n));
    store_typed(out_type, static_cast<char*>(out), d, sum, n);
  }
}

// out = the sum of `count` rows of `elements` each, taken in float32 and in their order; zeros without a row.
void sum_rows(DType type, const char* const* rows, int64_t count, int64_t elements, DType out_type,
              void* out) {
  switch (type) {
    case DType::kFloat32:
      return sum_rows_of<DType::kFloat32>(rows, count, elements, out_type, out);
    case DType::kBFloat16:
      return sum_rows_of<DType::kBFloat16>(rows, count, elements, out_type, out);
    case DType::kFloat16:
      return sum_rows_of<DType::kFloat16>(rows, count, elements, out_type, out);
  }
}

}  // namespace
}  // namespace cpu
}  // namespace idcore
