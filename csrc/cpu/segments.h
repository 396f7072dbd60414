// What the drivers share whose work items are segments of rows in one head: packing of K and V, items, and
// the sums that the items leave behind.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/kernels_bwd.h"
#include "cpu/team.h"
#include "cpu/workspace.h"

namespace idcore {
namespace cpu {

// Below this many multiply-adds waking the other threads costs more than they bring.
constexpr int64_t kSerialSegmentWork = 1 << 18;

inline int64_t element_size(DType t) { return t == DType::kFloat32 ? 4 : 2; }
inline int64_t length_of(const IdAttentionParams& p, int branch) {
  return branch == 0 ? p.lt : p.identity[branch - 1].length;
}

// K or V of one branch: where its rows lie, and which of them a sample of the call reads.
struct KeySource {
  const HeadTensor* tensor;
  const StageBank* bank;  // null: none
  int64_t bank_stride;

  bool per_sample() const { return bank != nullptr && bank->stride != 0; }
  int64_t stage(int64_t sample) const {
    if (bank == nullptr) return 0;
    return std::min<int64_t>(std::max<int64_t>(bank->index[sample * bank->stride], 0), bank->count - 1);
  }
};

class Segments {
 protected:
  Segments(const IdAttentionParams& params, const Kernels& kernels)
      : p_(params), k_(*kernels.backward), lanes_(kernels.lanes) {
    plan_.params = &p_;
    plan_.pairs = kernels.has_pairs && p_.dtype == DType::kBFloat16 && p_.head_dim % 2 == 0;
    plan_.segments = (p_.lq + kSegmentRows - 1) / kSegmentRows;
    plan_.padded_dim = (p_.head_dim + lanes_ - 1) / lanes_ * lanes_;
    items_ = p_.batch * plan_.segments * p_.heads;
    scratch_floats_ = (k_.scratch_floats(p_) + 15) / 16 * 16;
    threads_ = team_size(work(), kSerialSegmentWork);
  }

  const ItemKernels& kernels() const { return plan_.pairs ? k_.pairs : k_.float32; }
  int branches() const { return 1 + p_.num_identities; }

  KeySource key(int b) const {
    if (b > 0) return {&p_.identity[b - 1].k, nullptr, 0};
    return {&p_.k_text, p_.stage.index == nullptr ? nullptr : &p_.stage, p_.stage.k_stride};
  }
  KeySource value(int b) const {
    if (b > 0) return {&p_.identity[b - 1].v, nullptr, 0};
    return {&p_.v_text, p_.stage.index == nullptr ? nullptr : &p_.stage, p_.stage.v_stride};
  }

  int64_t work() const {
    int64_t keys = 0;
    for (int b = 0; b < branches(); ++b) keys += length_of(p_, b);
    return p_.batch * p_.heads * p_.lq * p_.head_dim * keys;
  }

  PackedTwice packed(Pieces& pieces, int b, const KeySource& s) const {
    const int64_t count = s.per_sample() ? p_.batch : s.tensor->batch, length = length_of(p_, b);
    const int64_t per_step = plan_.pairs ? 2 : 1;
    const int64_t dots = (k_.packed_dots_words(length, p_.head_dim / per_step) + 15) / 16 * 16;
    const int64_t rows = ((length + per_step - 1) / per_step * plan_.padded_dim + 15) / 16 * 16;
    float* first = pieces.take<float>(dots * p_.heads * count);
    return {first, pieces.take<float>(rows * p_.heads * count), count, dots, rows};
  }

  void lay_out_keys(Pieces& pieces) {
    for (int b = 0; b < branches(); ++b) {
      plan_.k[b] = packed(pieces, b, key(b));
      plan_.v[b] = packed(pieces, b, value(b));
    }
    scratch_ = pieces.take<float>(scratch_floats_ * threads_);
  }

  float* item_sums(Pieces& pieces, int branch) const {
    return pieces.take<float>(items_ * length_of(p_, branch) * plan_.padded_dim);
  }

  void pack() {
    for (int b = 0; b < branches(); ++b) {
      pack_one(b, key(b), plan_.k[b]);
      pack_one(b, value(b), plan_.v[b]);
    }
#pragma omp barrier
  }

  void pack_one(int branch, const KeySource& s, const PackedTwice& to) {
    const int64_t size = element_size(p_.dtype), length = length_of(p_, branch);
    if (length == 0) return;
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < to.count * p_.heads; ++i) {
      const int64_t b = i / p_.heads, row = s.per_sample() ? b * s.tensor->batch / p_.batch : b;
      const int64_t at =
          s.stage(b) * s.bank_stride + row * s.tensor->stride_batch + i % p_.heads * s.tensor->stride_head;
      k_.pack(p_.dtype, plan_.pairs, static_cast<const char*>(s.tensor->data) + at * size,
              s.tensor->stride_row * size, length, p_.head_dim, to.dots + i * to.dots_stride,
              to.rows + i * to.rows_stride);
    }
  }

  // work(batch, segment, head, scratch) for every item.
  template <class Work>
  void each_item(Work work) {
    float* scratch = scratch_ + scratch_floats_ * thread_number();
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < items_; ++i) {
      const int64_t segment = i / p_.heads;
      work(segment / plan_.segments, segment % plan_.segments, i % p_.heads, scratch);
    }
  }

  // Adds the items of all samples and segments that read one row of K or V.
  void reduce(int branch, const KeySource& s, float* items, void* out) {
    const int64_t size = length_of(p_, branch) * plan_.padded_dim, count = s.tensor->batch;
    const int64_t stages = s.bank == nullptr ? 1 : s.bank->count, shared = p_.batch / count;
    const int64_t bytes = length_of(p_, branch) * p_.head_dim * element_size(p_.dtype);
    if (bytes == 0) return;
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < stages * count * p_.heads; ++i) {
      const int64_t h = i % p_.heads, row = i / p_.heads % count, stage = i / (p_.heads * count);
      char* to = static_cast<char*>(out) + i * bytes;
      float* sum = nullptr;
      for (int64_t b = row * shared; b < (row + 1) * shared; ++b) {
        if (s.stage(b) != stage) continue;
        for (int64_t g = 0; g < plan_.segments; ++g) {
          float* item = items + ((b * plan_.segments + g) * p_.heads + h) * size;
          if (sum != nullptr) {
            for (int64_t e = 0; e < size; ++e) sum[e] += item[e];
          } else {
            sum = item;
          }
        }
      }
      if (sum == nullptr) {
        std::memset(to, 0, static_cast<size_t>(bytes));
      } else {
        k_.store(p_.dtype, sum, length_of(p_, branch), p_.head_dim, to);
      }
    }
  }

  const IdAttentionParams& p_;
  const BackwardKernels& k_;
  const int64_t lanes_;
  BackwardPlan plan_{};
  int64_t items_ = 0;
  int64_t scratch_floats_ = 0;
  int threads_ = 1;
  float* scratch_ = nullptr;
};

}  // namespace cpu
}  // namespace idcore
