// The losses on attention maps on the CPU. Deterministic, any number of threads. They throw std::bad_alloc.
#pragma once

#include "cpu/kernels.h"
#include "token_losses_params.h"

namespace idcore {
namespace cpu {

double token_loss_fwd(const TokenLossParams& params, const Kernels& kernels);
void token_loss_bwd(const TokenLossParams& params, const TokenLossGrads& grads, const Kernels& kernels);
void semantic_fwd(const SemanticParams& params, const Kernels& kernels);
void semantic_bwd(const SemanticParams& params, const SemanticGrads& grads, const Kernels& kernels);

}  // namespace cpu
}  // namespace idcore
