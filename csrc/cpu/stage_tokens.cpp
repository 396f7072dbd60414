#include "cpu/stage_tokens.h"

#include <algorithm>
#include <cstring>

namespace idcore {
namespace cpu {
namespace {

// Below so many bytes the other threads are not woken (our choice).
constexpr int64_t kSerialBytes = int64_t{1} << 20;

void copy_sample(const StageTokensParams& p, int64_t stage, int64_t b, char* out) {
  const char* from = p.embeddings + b * p.embeddings_batch;
  const auto row = static_cast<size_t>(p.row_bytes);
  if (p.embeddings_row == p.row_bytes) {
    std::memcpy(out, from, row * static_cast<size_t>(p.length));
  } else {
    for (int64_t l = 0; l < p.length; ++l)
      std::memcpy(out + l * p.row_bytes, from + l * p.embeddings_row, row);
  }
  const char* bank = p.bank + stage * p.bank_stage + b * p.token_batch / p.batch * p.bank_batch;
  for (int64_t t = 0; t < p.tokens; ++t) {
    const int64_t at = p.positions[b * p.positions_batch + t * p.positions_token];
    if (at >= 0 && at < p.length) std::memcpy(out + at * p.row_bytes, bank + t * p.bank_token, row);
  }
}

}  // namespace

void stage_tokens(const StageTokensParams& p) {
  const int64_t sample = p.length * p.row_bytes, count = (p.stage == nullptr ? p.stages : 1) * p.batch;
  const bool parallel = count * sample > kSerialBytes;
#pragma omp parallel for schedule(static) if (parallel)
  for (int64_t i = 0; i < count; ++i) {
    const int64_t b = i % p.batch;
    int64_t stage = i / p.batch;
    if (p.stage != nullptr) stage = std::min(std::max<int64_t>(p.stage[b * p.stage_stride], 0), p.stages - 1);
    copy_sample(p, stage, b, p.out + i * sample);
  }
}

}  // namespace cpu
}  // namespace idcore
