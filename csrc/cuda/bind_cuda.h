// Python doors of the CUDA kernels, for csrc/bind.cpp:  idcore::cuda::bind_cuda(m, params_of);
//
// `params_of` turns bind.cpp's seven tuples into IdAttentionParams, so both backends share one form of a call.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda/id_attention_fwd.h"

namespace idcore {
namespace cuda {

template <class ParamsOf>
void bind_cuda(pybind11::module_& m, ParamsOf params_of) {
  using pybind11::tuple;
  m.def(
      "id_attention_cuda_workspace",
      [params_of](const tuple& numbers, const tuple& q, const tuple& k_text, const tuple& v_text, const tuple& out,
                  const tuple& text_bias, const tuple& identities) {
        return id_attention_workspace(params_of(numbers, q, k_text, v_text, out, text_bias, identities));
      },
      "Bytes of scratch memory on the device that id_attention_cuda needs for this call.");
  m.def(
      "id_attention_cuda",
      [params_of](const tuple& numbers, const tuple& q, const tuple& k_text, const tuple& v_text, const tuple& out,
                  const tuple& text_bias, const tuple& identities, uintptr_t workspace, uintptr_t stream) {
        const IdAttentionParams p = params_of(numbers, q, k_text, v_text, out, text_bias, identities);
        if (const char* refusal = id_attention_refusal(p))
          throw pybind11::value_error(std::string("id_attention_cuda: ") + refusal);
        const int error = id_attention_fwd(p, reinterpret_cast<void*>(workspace), reinterpret_cast<void*>(stream));
        if (error != 0)
          throw std::runtime_error(std::string("id_attention_cuda: CUDA error ") + std::to_string(error) + ": " +
                                   error_text(error));
      },
      "Forward of id_attention on a CUDA stream of the current device; see csrc/bind.cpp for the tuples.");
}

}  // namespace cuda
}  // namespace idcore
