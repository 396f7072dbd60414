#include "cpu/stage_tokens.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/team.h"

namespace idcore {
namespace cpu {
namespace {

// Below so many bytes the other threads are not woken (our choice).
constexpr int64_t kSerialBytes = int64_t{1} << 20;

int64_t stage_of(int64_t wanted, int64_t stages) {
  return std::min(std::max<int64_t>(wanted, 0), stages - 1);
}

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

class Backward {
 public:
  Backward(const StageTokensGrads& p, const Kernels& k)
      : p_(p), k_(k), row_bytes_(p.width * (p.dtype == DType::kFloat32 ? 4 : 2)) {
    copies_ = p.stage == nullptr ? p.stages : 1;
    most_ = std::max(copies_, p.batch);
    threads_ = team_size(copies_ * p.batch * p.length * row_bytes_, kSerialBytes);
    lists_.resize(static_cast<size_t>(most_ * threads_));
    if (p.embeddings != nullptr) find_replaced();
  }

  void run() {
#pragma omp parallel num_threads(threads_)
    {
      const char** rows = lists_.data() + most_ * thread_number();
      if (p_.embeddings != nullptr) {
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < p_.batch * p_.length; ++i) embedding(i, rows);
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < p_.stages * p_.token_batch * p_.tokens; ++i) token(i, rows);
    }
  }

 private:
  int64_t position(int64_t b, int64_t t) const {
    return p_.positions[b * p_.positions_batch + t * p_.positions_token];
  }

  const char* row(int64_t copy, int64_t b, int64_t l) const {
    return p_.g + ((copy * p_.batch + b) * p_.length + l) * row_bytes_;
  }

  void find_replaced() {
    replaced_.assign(static_cast<size_t>(p_.batch * p_.length), 0);
    for (int64_t b = 0; b < p_.batch; ++b) {
      for (int64_t t = 0; t < p_.tokens; ++t) {
        const int64_t at = position(b, t);
        if (at >= 0 && at < p_.length) replaced_[b * p_.length + at] = 1;
      }
    }
  }

  // Row i of the embeddings: what all stages make of it, or nothing where a token stood.
  void embedding(int64_t i, const char** rows) const {
    int64_t count = 0;
    for (int64_t s = 0; replaced_[i] == 0 && s < copies_; ++s)
      rows[count++] = row(s, i / p_.length, i % p_.length);
    k_.sum_rows(p_.dtype, rows, count, p_.width, p_.dtype, p_.embeddings + i * row_bytes_);
  }

  // Token i of the bank: every sample that read it.
  void token(int64_t i, const char** rows) const {
    const int64_t t = i % p_.tokens, owner = i / p_.tokens % p_.token_batch;
    const int64_t stage = i / (p_.tokens * p_.token_batch), shared = p_.batch / p_.token_batch;
    int64_t count = 0;
    for (int64_t b = owner * shared; b < (owner + 1) * shared; ++b) {
      const int64_t at = position(b, t);
      if (at < 0 || at >= p_.length) continue;
      if (p_.stage == nullptr) {
        rows[count++] = row(stage, b, at);
      } else if (stage_of(p_.stage[b * p_.stage_stride], p_.stages) == stage) {
        rows[count++] = row(0, b, at);
      }
    }
    k_.sum_rows(p_.dtype, rows, count, p_.width, DType::kFloat32, p_.bank + i * p_.width);
  }

  const StageTokensGrads& p_;
  const Kernels& k_;
  const int64_t row_bytes_;
  int64_t copies_ = 1, most_ = 1;
  int threads_ = 1;
  std::vector<const char*> lists_;
  std::vector<char> replaced_;
};

}  // namespace

void stage_tokens_bwd(const StageTokensGrads& grads, const Kernels& kernels) {
  Backward(grads, kernels).run();
}

void stage_tokens(const StageTokensParams& p) {
  const int64_t sample = p.length * p.row_bytes, count = (p.stage == nullptr ? p.stages : 1) * p.batch;
  const bool parallel = count * sample > kSerialBytes;
#pragma omp parallel for schedule(static) if (parallel)
  for (int64_t i = 0; i < count; ++i) {
    const int64_t b = i % p.batch;
    int64_t stage = i / p.batch;
    if (p.stage != nullptr) stage = stage_of(p.stage[b * p.stage_stride], p.stages);
    copy_sample(p, stage, b, p.out + i * sample);
  }
}

}  // namespace cpu
}  // namespace idcore
