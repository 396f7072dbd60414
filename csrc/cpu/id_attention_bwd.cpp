#include "cpu/id_attention_bwd.h"

#include "cpu/segments.h"

namespace idcore {
namespace cpu {
namespace {

class Backward : Segments {
 public:
  Backward(const IdAttentionParams& params, const IdAttentionStats& stats, const IdAttentionGrads& grads,
           const Kernels& kernels)
      : Segments(params, kernels), grads_(grads) {
    plan_.stats = &stats;
    plan_.grads = &grads_;
    plan_.two_passes = p_.merge != Merge::kAdd && p_.num_identities > 0;
    // For few rows h must be the one that alpha was made of: float32 there too.
    if (plan_.two_passes && p_.lq <= kFewRows) plan_.pairs = false;
    plan_.wait_dtype = p_.lq <= kFewRows ? DType::kFloat32 : p_.dtype;
  }

  void run() {
    lay_out(nullptr);
    lay_out(thread_workspace().at_least(bytes_));
#pragma omp parallel num_threads(threads_)
    {
      const FlushSubnormals flush;
      pack();
      if (plan_.two_passes) {
        each_item([&](auto... item) { kernels().gather(plan_, item...); });
        numerators();
        if (plan_.dshare != nullptr) mean_dshare();
      }
      each_item([&](auto... item) { kernels().scatter(plan_, item...); });
      scales();
      for (int b = 0; b < branches(); ++b) {
        if (plan_.dk[b] == nullptr) continue;
        reduce(b, key(b), plan_.dk[b], b == 0 ? grads_.dk_text : grads_.dk_id[b - 1]);
        reduce(b, value(b), plan_.dv[b], b == 0 ? grads_.dv_text : grads_.dv_id[b - 1]);
      }
    }
  }

 private:
  void lay_out(char* base) {
    Pieces pieces(base);
    const int64_t n = p_.num_identities, width = plan_.padded_dim, rows = plan_.segments * kSegmentRows;
    lay_out_keys(pieces);
    for (int b = 0; b < branches(); ++b) {
      const bool wanted = b == 0 ? grads_.dk_text != nullptr : grads_.dk_id[b - 1] != nullptr;
      plan_.dk[b] = wanted ? item_sums(pieces, b) : nullptr;
      plan_.dv[b] = wanted ? item_sums(pieces, b) : nullptr;
    }
    plan_.dscale = pieces.take<float>(items_ * n * lanes_);
    const bool two = plan_.two_passes, v2 = two && p_.merge == Merge::kOrthoV2;
    const int64_t bytes = element_size(plan_.wait_dtype);
    plan_.text = two ? pieces.take<char>(items_ * kSegmentRows * width * bytes) : nullptr;
    plan_.sums = two ? pieces.take<float>(items_ * n * width) : nullptr;
    plan_.numerator = two ? pieces.take<float>(n * p_.batch * p_.heads * width) : nullptr;
    plan_.dshare = v2 ? pieces.take<float>(n * p_.batch * p_.heads * rows) : nullptr;
    bytes_ = pieces.used();
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

  const IdAttentionGrads& grads_;
  size_t bytes_ = 0;
};

}  // namespace

void id_attention_bwd(const IdAttentionParams& params, const IdAttentionStats& stats,
                      const IdAttentionGrads& grads, const Kernels& kernels) {
  if (params.batch == 0 || params.heads == 0 || params.lq == 0 || params.head_dim == 0) return;
  Backward(params, stats, grads, kernels).run();
}

}  // namespace cpu
}  // namespace idcore
