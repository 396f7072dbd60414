#include "cpu/token_losses.h"

#include <cmath>

#include "cpu/segments.h"

namespace idcore {
namespace cpu {
namespace {

// A loss in the words of id_attention: k the text's keys, v what else is multiplied with the queries.
template <class Params>
IdAttentionParams as_attention(const Params& p, const HeadTensor& v) {
  IdAttentionParams a{};
  a.dtype = p.dtype;
  a.batch = p.batch;
  a.heads = p.heads;
  a.lq = p.lq;
  a.lt = p.lt;
  a.head_dim = p.head_dim;
  a.q = p.q;
  a.k_text = p.k;
  a.v_text = v;
  return a;
}

class TokenLoss : Segments {
 public:
  TokenLoss(const TokenLossParams& p, const IdAttentionParams& a, const Kernels& kernels)
      : Segments(a, kernels) {
    loss_.keys = &plan_;
    loss_.weight = p.weight;
    loss_.weight_stride_batch = p.weight_stride_batch;
    loss_.weight_stride_token = p.weight_stride_token;
  }

  double forward() {
    lay_out(nullptr, false);
    lay_out(thread_workspace().at_least(bytes_), false);
#pragma omp parallel num_threads(threads_)
    {
      const FlushSubnormals flush;
      pack();
      each_item([&](auto... item) { kernels().token_loss(loss_, item...); });
    }
    double sum = 0.0;
    for (int64_t i = 0; i < items_ * lanes_; ++i) sum += loss_.loss[i];
    return sum;
  }

  void backward(const TokenLossGrads& grads) {
    loss_.factor = grads.factor;
    loss_.dq = grads.dq;
    lay_out(nullptr, true);
    lay_out(thread_workspace().at_least(bytes_), true);
#pragma omp parallel num_threads(threads_)
    {
      const FlushSubnormals flush;
      pack();
      each_item([&](auto... item) { kernels().token_loss_grad(loss_, item...); });
      reduce(0, key(0), plan_.dk[0], grads.dk);
    }
  }

 private:
  void lay_out(char* base, bool gradients) {
    Pieces pieces(base);
    lay_out_keys(pieces);
    loss_.loss = pieces.take<float>(items_ * lanes_);
    plan_.dk[0] = gradients ? item_sums(pieces, 0) : nullptr;
    bytes_ = pieces.used();
  }

  LossPlan loss_{};
  size_t bytes_ = 0;
};

class Semantic : Segments {
 public:
  Semantic(const IdAttentionParams& a, const Kernels& kernels) : Segments(a, kernels) {
    loss_.keys = &plan_;
    scratch_floats_ = (k_.semantic_scratch(p_) + 15) / 16 * 16;
  }

  void forward(const SemanticParams& to) {
    lay_out(nullptr);
    lay_out(thread_workspace().at_least(bytes_));
#pragma omp parallel num_threads(threads_)
    {
      const FlushSubnormals flush;
      pack();
      each_item([&](auto... item) { kernels().semantic(loss_, item...); });
      combine(to);
    }
  }

  void backward(const SemanticGrads& grads) {
    loss_.lse = grads.lse;
    loss_.delta = grads.delta;
    loss_.dq = grads.dq;
    lay_out(nullptr);
    lay_out(thread_workspace().at_least(bytes_));
#pragma omp parallel num_threads(threads_)
    {
      const FlushSubnormals flush;
      pack();
      each_item([&](auto... item) { kernels().semantic_grad(loss_, item...); });
      reduce(0, key(0), plan_.dk[0], grads.dk);
    }
  }

 private:
  void lay_out(char* base) {
    Pieces pieces(base);
    lay_out_keys(pieces);
    plan_.dk[0] = item_sums(pieces, 0);
    plan_.dv[0] = plan_.dk[0];  // forward and backward need one of the two
    loss_.top = pieces.take<float>(items_ * p_.lt);
    loss_.sum = pieces.take<float>(items_ * p_.lt);
    bytes_ = pieces.used();
  }

  // The segments' softmaxes to one, in their order; into the first segment's place, then to the result.
  void combine(const SemanticParams& to) {
    const float scale = 1.44269504f / std::sqrt(static_cast<float>(p_.head_dim));
    const int64_t width = plan_.padded_dim, size = p_.lt * width;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p_.batch * p_.heads; ++i) {
      const int64_t first = i / p_.heads * plan_.segments * p_.heads + i % p_.heads;
      for (int64_t t = 0; t < p_.lt; ++t) {
        float top = loss_.top[first * p_.lt + t], total = 0.0f;
        for (int64_t s = 1; s < plan_.segments; ++s) {
          const float other = loss_.top[(first + s * p_.heads) * p_.lt + t];
          top = other > top || other != other ? other : top;
        }
        float* to_row = plan_.dv[0] + first * size + t * width;
        for (int64_t s = 0; s < plan_.segments; ++s) {
          const int64_t item = first + s * p_.heads;
          const float part = std::exp2((loss_.top[item * p_.lt + t] - top) * scale);
          const float* row = plan_.dv[0] + item * size + t * width;
          total += part * loss_.sum[item * p_.lt + t];
          for (int64_t d = 0; d < width; ++d) to_row[d] = s == 0 ? part * row[d] : to_row[d] + part * row[d];
        }
        for (int64_t d = 0; d < width; ++d) to_row[d] /= total;
        to.lse[i * p_.lt + t] = top * scale + std::log2(total);
      }
      const int64_t bytes = p_.lt * p_.head_dim * element_size(p_.dtype);
      k_.store(p_.dtype, plan_.dv[0] + first * size, p_.lt, p_.head_dim,
               static_cast<char*>(to.out) + i * bytes);
    }
  }

  LossPlan loss_{};
  size_t bytes_ = 0;
};

}  // namespace

double token_loss_fwd(const TokenLossParams& params, const Kernels& kernels) {
  const IdAttentionParams a = as_attention(params, params.k_ref);
  return TokenLoss(params, a, kernels).forward();
}

void token_loss_bwd(const TokenLossParams& params, const TokenLossGrads& grads, const Kernels& kernels) {
  const IdAttentionParams a = as_attention(params, params.k_ref);
  TokenLoss(params, a, kernels).backward(grads);
}

void semantic_fwd(const SemanticParams& params, const Kernels& kernels) {
  const IdAttentionParams a = as_attention(params, params.k);
  Semantic(a, kernels).forward(params);
}

void semantic_bwd(const SemanticParams& params, const SemanticGrads& grads, const Kernels& kernels) {
  const IdAttentionParams a = as_attention(params, grads.g);
  Semantic(a, kernels).backward(grads);
}

}  // namespace cpu
}  // namespace idcore
