#include "cpu/id_attention_bwd.h"

#include <algorithm>
#include <cstring>

#include "cpu/workspace.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace idcore {
namespace cpu {
namespace {

// Below this many multiply-adds waking the other threads costs more than they bring.
constexpr int64_t kSerialWork = 1 << 18;

int64_t element_size(DType t) { return t == DType::kFloat32 ? 4 : 2; }
int64_t length_of(const IdAttentionParams& p, int branch) {
  return branch == 0 ? p.lt : p.identity[branch - 1].length;
}

// K or V of one branch: where its rows lie, and which of them a sample of the call reads.
struct Source {
  const HeadTensor* tensor;
  const StageBank* bank;  // null: none
  int64_t bank_stride;

  bool per_sample() const { return bank != nullptr && bank->stride != 0; }
  int64_t stage(int64_t sample) const {
    if (bank == nullptr) return 0;
    return std::min<int64_t>(std::max<int64_t>(bank->index[sample * bank->stride], 0), bank->count - 1);
  }
};

class Backward {
 public:
  Backward(const IdAttentionParams& params, const IdAttentionStats& stats, const IdAttentionGrads& grads,
           const Kernels& kernels)
      : p_(params), grads_(grads), k_(*kernels.backward), lanes_(kernels.lanes) {
    plan_.params = &p_;
    plan_.stats = &stats;
    plan_.grads = &grads_;
    plan_.two_passes = p_.merge != Merge::kAdd && p_.num_identities > 0;
    plan_.segments = (p_.lq + kSegmentRows - 1) / kSegmentRows;
    plan_.padded_dim = (p_.head_dim + lanes_ - 1) / lanes_ * lanes_;
    const bool few = p_.lq <= kFewRows;
    plan_.wait_dtype = few ? DType::kFloat32 : p_.dtype;
    items_ = p_.batch * plan_.segments * p_.heads;
    scratch_floats_ = (k_.scratch_floats(p_) + 15) / 16 * 16;
    threads_ = threads();
  }

  void run() {
    lay_out(nullptr);
    lay_out(thread_workspace().at_least(bytes_));
#pragma omp parallel num_threads(threads_)
    {
      const FlushSubnormals flush;
      pack();
      if (plan_.two_passes) {
        each_item(k_.gather);
        numerators();
        if (plan_.dshare != nullptr) mean_dshare();
      }
      each_item(k_.scatter);
      scales();
      for (int b = 0; b < branches(); ++b) {
        if (plan_.dk[b] == nullptr) continue;
        reduce(b, key(b), plan_.dk[b], b == 0 ? grads_.dk_text : grads_.dk_id[b - 1]);
        reduce(b, value(b), plan_.dv[b], b == 0 ? grads_.dv_text : grads_.dv_id[b - 1]);
      }
    }
  }

 private:
  int branches() const { return 1 + p_.num_identities; }

  Source key(int b) const {
    if (b > 0) return {&p_.identity[b - 1].k, nullptr, 0};
    return {&p_.k_text, p_.stage.index == nullptr ? nullptr : &p_.stage, p_.stage.k_stride};
  }
  Source value(int b) const {
    if (b > 0) return {&p_.identity[b - 1].v, nullptr, 0};
    return {&p_.v_text, p_.stage.index == nullptr ? nullptr : &p_.stage, p_.stage.v_stride};
  }

  int threads() const {
#if defined(_OPENMP)
    int64_t keys = 0;
    for (int b = 0; b < branches(); ++b) keys += length_of(p_, b);
    if (p_.batch * p_.heads * p_.lq * p_.head_dim * keys < kSerialWork || omp_in_parallel()) return 1;
    return static_cast<int>(std::min<int64_t>(omp_get_max_threads(), std::max<int64_t>(items_, 1)));
#else
    return 1;
#endif
  }

  PackedTwice packed(Pieces& pieces, int b, const Source& s) const {
    const int64_t count = s.per_sample() ? p_.batch : s.tensor->batch, length = length_of(p_, b);
    const int64_t dots = (k_.packed_dots_words(length, p_.head_dim) + 15) / 16 * 16;
    const int64_t rows = (length * plan_.padded_dim + 15) / 16 * 16;
    float* first = pieces.take<float>(dots * p_.heads * count);
    return {first, pieces.take<float>(rows * p_.heads * count), count, dots, rows};
  }

  void lay_out(char* base) {
    Pieces pieces(base);
    const int64_t n = p_.num_identities, width = plan_.padded_dim, rows = plan_.segments * kSegmentRows;
    for (int b = 0; b < branches(); ++b) {
      plan_.k[b] = packed(pieces, b, key(b));
      plan_.v[b] = packed(pieces, b, value(b));
      const bool wanted = b == 0 ? grads_.dk_text != nullptr : grads_.dk_id[b - 1] != nullptr;
      const int64_t size = items_ * length_of(p_, b) * width;
      plan_.dk[b] = wanted ? pieces.take<float>(size) : nullptr;
      plan_.dv[b] = wanted ? pieces.take<float>(size) : nullptr;
    }
    scratch_ = pieces.take<float>(scratch_floats_ * threads_);
    plan_.dscale = pieces.take<float>(items_ * n * lanes_);
    const bool two = plan_.two_passes, v2 = two && p_.merge == Merge::kOrthoV2;
    const int64_t bytes = element_size(plan_.wait_dtype);
    plan_.text = two ? pieces.take<char>(items_ * kSegmentRows * width * bytes) : nullptr;
    plan_.sums = two ? pieces.take<float>(items_ * n * width) : nullptr;
    plan_.numerator = two ? pieces.take<float>(n * p_.batch * p_.heads * width) : nullptr;
    plan_.dshare = v2 ? pieces.take<float>(n * p_.batch * p_.heads * rows) : nullptr;
    bytes_ = pieces.used();
  }

  void pack() {
    for (int b = 0; b < branches(); ++b) {
      pack_one(b, key(b), plan_.k[b]);
      pack_one(b, value(b), plan_.v[b]);
    }
#pragma omp barrier
  }

  void pack_one(int branch, const Source& s, const PackedTwice& to) {
    const int64_t size = element_size(p_.dtype), length = length_of(p_, branch);
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < to.count * p_.heads; ++i) {
      const int64_t b = i / p_.heads, row = s.per_sample() ? b * s.tensor->batch / p_.batch : b;
      const int64_t at =
          s.stage(b) * s.bank_stride + row * s.tensor->stride_batch + i % p_.heads * s.tensor->stride_head;
      k_.pack(p_.dtype, static_cast<const char*>(s.tensor->data) + at * size, s.tensor->stride_row * size,
              length, p_.head_dim, to.dots + i * to.dots_stride, to.rows + i * to.rows_stride);
    }
  }

  template <class Work>
  void each_item(Work work) {
#if defined(_OPENMP)
    float* scratch = scratch_ + scratch_floats_ * omp_get_thread_num();
#else
    float* scratch = scratch_;
#endif
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < items_; ++i) {
      const int64_t segment = i / p_.heads;
      work(plan_, segment / plan_.segments, segment % plan_.segments, i % p_.heads, scratch);
    }
  }

  // The sum over segments of what `item_sums` holds for head h of sample b, identity j, element d.
  double total(const float* item_sums, int64_t b, int64_t h, int64_t j, int64_t d, int64_t width) const {
    double sum = 0.0;
    for (int64_t s = 0; s < plan_.segments; ++s) {
      sum += item_sums[(((b * plan_.segments + s) * p_.heads + h) * p_.num_identities + j) * width + d];
    }
    return sum;
  }

  float scale(int64_t j, int64_t b) const {
    const Identity& id = p_.identity[j];
    return id.scale_data == nullptr ? id.scale : id.scale_data[b * id.scale_stride];
  }

  // Gradient of alpha's numerator: s sum w beta g h / den; 0 where alpha is 0 by definition.
  void numerators() {
    const int64_t width = plan_.padded_dim;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p_.num_identities * p_.batch * p_.heads; ++i) {
      const int64_t h = i % p_.heads, b = i / p_.heads % p_.batch, j = i / (p_.heads * p_.batch);
      for (int64_t d = 0; d < width; ++d) {
        const double den = d < p_.head_dim ? plan_.stats->den[i * p_.head_dim + d] : 0.0;
        const double sum = scale(j, b) * total(plan_.sums, b, h, j, d, width);
        plan_.numerator[i * width + d] = den == 0.0 ? 0.0f : static_cast<float>(sum / den);
      }
    }
  }

  // a is a mean over heads: each head's gradient is their sum's H-th part. It replaces that of head 0.
  void mean_dshare() {
    const int64_t rows = plan_.segments * kSegmentRows;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p_.num_identities * p_.batch; ++i) {
      float* mean = plan_.dshare + i * p_.heads * rows;
      for (int64_t h = 1; h < p_.heads; ++h) {
        for (int64_t r = 0; r < p_.lq; ++r) mean[r] += mean[h * rows + r];
      }
      for (int64_t r = 0; r < p_.lq; ++r) mean[r] /= static_cast<float>(p_.heads);
    }
  }

  void scales() {
    const int64_t n = p_.num_identities;
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < n * p_.batch; ++i) {
      double sum = 0.0;
      for (int64_t e = 0; e < p_.heads * lanes_; ++e)
        sum += total(plan_.dscale, i % p_.batch, e / lanes_, i / p_.batch, e % lanes_, lanes_);
      grads_.dscale[i] = static_cast<float>(sum);
    }
  }

  // Adds the items of all samples and segments that read one row of K or V.
  void reduce(int branch, const Source& s, float* items, void* out) {
    const int64_t size = length_of(p_, branch) * plan_.padded_dim, count = s.tensor->batch;
    const int64_t stages = s.bank == nullptr ? 1 : s.bank->count, shared = p_.batch / count;
    const int64_t bytes = length_of(p_, branch) * p_.head_dim * element_size(p_.dtype);
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
  const IdAttentionGrads& grads_;
  const BackwardKernels& k_;
  const int64_t lanes_;
  BackwardPlan plan_{};
  int64_t items_ = 0;
  int64_t scratch_floats_ = 0;
  int threads_ = 1;
  size_t bytes_ = 0;
  float* scratch_ = nullptr;
};

}  // namespace

void id_attention_bwd(const IdAttentionParams& params, const IdAttentionStats& stats,
                      const IdAttentionGrads& grads, const Kernels& kernels) {
  if (params.batch == 0 || params.heads == 0 || params.lq == 0 || params.head_dim == 0) return;
  Backward(params, stats, grads, kernels).run();
}

}  // namespace cpu
}  // namespace idcore
