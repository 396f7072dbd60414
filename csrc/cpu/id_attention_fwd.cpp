#include "cpu/id_attention_fwd.h"

#include <algorithm>

#include "cpu/workspace.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace idcore {
namespace cpu {
namespace {

// Below this many multiply-adds waking the other threads costs more than they bring.
constexpr int64_t kSerialWork = 1 << 18;

int64_t length_of(const IdAttentionParams& p, int branch) {
  return branch == 0 ? p.lt : p.identity[branch - 1].length;
}
const HeadTensor& key_of(const IdAttentionParams& p, int branch) {
  return branch == 0 ? p.k_text : p.identity[branch - 1].k;
}
const HeadTensor& value_of(const IdAttentionParams& p, int branch) {
  return branch == 0 ? p.v_text : p.identity[branch - 1].v;
}

class Call {
 public:
  Call(const IdAttentionParams& params, const Kernels& kernels, const IdAttentionStats& stats)
      : p_(params), k_(kernels) {
    plan_.params = &p_;
    plan_.stats = stats;
    plan_.pairs = k_.has_pairs && p_.dtype == DType::kBFloat16 && p_.head_dim % 2 == 0;
    plan_.chunks = (p_.lq + kChunkRows - 1) / kChunkRows;
    plan_.padded_dim = (p_.head_dim + k_.lanes - 1) / k_.lanes * k_.lanes;
    two_passes_ = p_.merge != Merge::kAdd && p_.num_identities > 0;
    int64_t keys = 0;
    for (int b = 0; b < branches(); ++b) keys += length_of(p_, b);
    plan_.row_floats = k_.row_floats(keys, p_.head_dim);
    items_ = p_.batch * plan_.chunks * p_.heads;
    threads_ = threads_for(items_ * kChunkRows * p_.head_dim * keys);
  }

  void run() {
    lay_out(nullptr);
    lay_out(thread_workspace().at_least(bytes_));
#pragma omp parallel num_threads(threads_)
    {
      const FlushSubnormals flush;
      pack();
      attend();
      if (two_passes_) {
        ratios();
        if (plan_.stats.share != nullptr) mean_share();
        finish();
      }
    }
  }

 private:
  int branches() const { return 1 + p_.num_identities; }

  int threads_for(int64_t work) const {
#if defined(_OPENMP)
    if (work < kSerialWork || omp_in_parallel()) return 1;
    return static_cast<int>(std::min<int64_t>(omp_get_max_threads(), std::max<int64_t>(items_, 1)));
#else
    (void)work;
    return 1;
#endif
  }

  void lay_out(char* base) {
    Pieces pieces(base);
    for (int b = 0; b < branches(); ++b) {
      const int64_t k_words = k_.packed_k_words(length_of(p_, b), p_.head_dim, plan_.pairs);
      const int64_t v_words = k_.packed_v_words(length_of(p_, b), p_.head_dim, plan_.pairs);
      plan_.k[b] = packed(pieces, k_words, key_of(p_, b).batch);
      plan_.v[b] = packed(pieces, v_words, value_of(p_, b).batch);
    }
    scratch_ = pieces.take<float>(plan_.row_floats * threads_);
    const int64_t n = p_.num_identities, rows = plan_.chunks * kChunkRows, width = plan_.padded_dim;
    const bool few = p_.dtype != DType::kFloat32 && p_.lq <= kFewRows;
    const int64_t bytes = p_.dtype == DType::kFloat32 || few ? 4 : 2;
    plan_.text = two_passes_ ? pieces.take<char>(p_.batch * rows * p_.heads * width * bytes) : nullptr;
    plan_.mixed = two_passes_ && few ? pieces.take<float>(p_.batch * rows * p_.heads * width) : nullptr;
    plan_.sums = two_passes_ ? pieces.take<float>(items_ * n * 2 * width) : nullptr;
    plan_.alpha = two_passes_ ? pieces.take<float>(p_.batch * n * p_.heads * width) : nullptr;
    plan_.share =
        p_.merge == Merge::kOrthoV2 && n > 0 ? pieces.take<float>(n * p_.batch * p_.heads * rows) : nullptr;
    bytes_ = pieces.used();
  }

  Packed packed(Pieces& pieces, int64_t words, int64_t batch) const {
    const int64_t head = (words + 15) / 16 * 16;
    return Packed{pieces.take<float>(head * p_.heads * batch), head * p_.heads, head};
  }

  void pack() {
    for (int b = 0; b < branches(); ++b) {
      const int64_t k_items = key_of(p_, b).batch * p_.heads, v_items = value_of(p_, b).batch * p_.heads;
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < k_items; ++i) k_.pack_k(plan_, b, i / p_.heads, i % p_.heads);
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < v_items; ++i) k_.pack_v(plan_, b, i / p_.heads, i % p_.heads);
    }
#pragma omp barrier
  }

  void attend() {
#if defined(_OPENMP)
    float* scratch = scratch_ + plan_.row_floats * omp_get_thread_num();
#else
    float* scratch = scratch_;
#endif
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < items_; ++i) {
      const int64_t chunk = i / p_.heads;
      k_.attend(plan_, chunk / plan_.chunks, chunk % plan_.chunks, i % p_.heads, scratch);
    }
  }

  // alpha = sum w h i / sum w h h over all chunks, in their order and in double; 0 where the denominator is
  // 0.
  void ratios() {
    const int64_t n = p_.num_identities, width = plan_.padded_dim;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p_.batch * n * p_.heads; ++i) {
      const int64_t b = i / (n * p_.heads), j = i / p_.heads % n, h = i % p_.heads;
      for (int64_t d = 0; d < width; ++d) {
        double hi = 0.0, hh = 0.0;
        for (int64_t c = 0; c < plan_.chunks; ++c) {
          const float* s = plan_.sums + (((b * plan_.chunks + c) * p_.heads + h) * n + j) * 2 * width;
          hi += s[d];
          hh += s[width + d];
        }
        plan_.alpha[i * width + d] = hh == 0.0 ? 0.0f : static_cast<float>(hi / hh);
        if (plan_.stats.den == nullptr || d >= p_.head_dim) continue;
        const int64_t at = ((j * p_.batch + b) * p_.heads + h) * p_.head_dim + d;
        plan_.stats.alpha[at] = plan_.alpha[i * width + d];
        plan_.stats.den[at] = static_cast<float>(hh);
      }
    }
  }

  // The mean over heads of what the first tokens get, for backward.
  void mean_share() {
    const int64_t rows = plan_.chunks * kChunkRows;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p_.num_identities * p_.batch; ++i) {
      float* mean = plan_.stats.share + i * p_.lq;
      std::fill(mean, mean + p_.lq, 0.0f);
      for (int64_t h = 0; h < p_.heads; ++h) {
        const float* share = plan_.share + (i * p_.heads + h) * rows;
        for (int64_t r = 0; r < p_.lq; ++r) mean[r] += share[r];
      }
      for (int64_t r = 0; r < p_.lq; ++r) mean[r] /= static_cast<float>(p_.heads);
    }
  }

  void finish() {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p_.batch * plan_.chunks; ++i)
      k_.finish(plan_, i / plan_.chunks, i % plan_.chunks);
  }

  const IdAttentionParams& p_;
  const Kernels& k_;
  Plan plan_{};
  bool two_passes_ = false;
  int64_t items_ = 0;
  int threads_ = 1;
  size_t bytes_ = 0;
  float* scratch_ = nullptr;
};

}  // namespace

void id_attention_fwd(const IdAttentionParams& params, const Kernels& kernels,
                      const IdAttentionStats& stats) {
  if (params.batch == 0 || params.heads == 0 || params.lq == 0 || params.head_dim == 0) return;
  Call(params, kernels, stats).run();
}

bool has_openmp() {
#if defined(_OPENMP)
  return true;
#else
  return false;
#endif
}

int max_threads() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

}  // namespace cpu
}  // namespace idcore
