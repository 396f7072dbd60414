// The tuples of integers that reach idcore._C, and the plain structs that they become. Included by bind.cpp
// alone.
//
// Tensors arrive as tuples, so that neither PyTorch nor NumPy is needed to build:
//   (address, batch, stride of batch, stride of head, stride of row), strides in elements.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "align_face.h"
#include "cpu/stage_tokens.h"
#include "cpu/token_losses.h"
#include "id_attention.h"

namespace py = pybind11;

namespace idcore {
namespace tuples {

inline int64_t int_at(const py::tuple& t, size_t i) {
  const int64_t x = PyLong_AsLongLong(PyTuple_GET_ITEM(t.ptr(), static_cast<Py_ssize_t>(i)));
  if (x == -1 && PyErr_Occurred()) throw py::error_already_set();
  return x;
}

template <class T>
T* pointer_at(const py::tuple& t, size_t i) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(int_at(t, i)));
}

inline void want_size(const py::tuple& t, size_t size, const char* name) {
  if (t.size() != size) {
    throw py::value_error(std::string(name) + " must be a tuple of " + std::to_string(size) + ", got " +
                          std::to_string(t.size()));
  }
}

inline DType dtype_of(int64_t x) {
  if (x < 0 || x > 2)
    throw py::value_error("id_attention: dtype must be 0 (float32), 1 (bfloat16) or 2 (float16)");
  return static_cast<DType>(x);
}

inline HeadTensor head_tensor(const py::tuple& t, const char* name) {
  want_size(t, 5, name);
  return HeadTensor{pointer_at<void>(t, 0), int_at(t, 1), int_at(t, 2), int_at(t, 3), int_at(t, 4)};
}

// (k, v, Li, scale, address of scales or 0, their stride, address of mask or 0, its strides of batch and row)
inline Identity identity_of(const py::tuple& t) {
  want_size(t, 9, "an identity");
  Identity id;
  id.k = head_tensor(py::reinterpret_borrow<py::tuple>(t[0]), "k_id");
  id.v = head_tensor(py::reinterpret_borrow<py::tuple>(t[1]), "v_id");
  id.length = int_at(t, 2);
  id.scale = t[3].cast<float>();
  id.scale_data = pointer_at<const float>(t, 4);
  id.scale_stride = int_at(t, 5);
  id.mask = pointer_at<const float>(t, 6);
  id.mask_stride_batch = int_at(t, 7);
  id.mask_stride_row = int_at(t, 8);
  return id;
}

// numbers: (dtype, merge, B, H, Lq, Lt, D, num_zero, num_global)
// stage: (), or (address of the indices, stages, stride of the indices, strides of k_text and v_text between
// stages)
inline IdAttentionParams params_of(const py::tuple& numbers, const py::tuple& q, const py::tuple& k_text,
                                   const py::tuple& v_text, const py::tuple& out, const py::tuple& text_bias,
                                   const py::tuple& identities, const py::tuple& stage) {
  want_size(numbers, 9, "numbers");
  IdAttentionParams p{};
  p.dtype = dtype_of(int_at(numbers, 0));
  const int64_t merge = int_at(numbers, 1);
  if (merge < 0 || merge > 2)
    throw py::value_error("id_attention: merge must be 0 (add), 1 (ortho) or 2 (ortho_v2)");
  p.merge = static_cast<Merge>(merge);
  p.batch = int_at(numbers, 2);
  p.heads = int_at(numbers, 3);
  p.lq = int_at(numbers, 4);
  p.lt = int_at(numbers, 5);
  p.head_dim = int_at(numbers, 6);
  p.num_zero = static_cast<int32_t>(int_at(numbers, 7));
  p.num_global = static_cast<int32_t>(int_at(numbers, 8));
  if (p.head_dim > kMaxHeadDim) throw py::value_error("id_attention: head dim above 256");
  if (identities.size() > kMaxIdentities) throw py::value_error("id_attention: more than 16 identities");
  p.q = head_tensor(q, "q");
  p.k_text = head_tensor(k_text, "k_text");
  p.v_text = head_tensor(v_text, "v_text");
  p.out = head_tensor(out, "out");
  if (text_bias.size() != 0) {
    want_size(text_bias, 6, "text_bias");
    p.text_bias = TextBias{pointer_at<const void>(text_bias, 0),
                           dtype_of(int_at(text_bias, 1)),
                           int_at(text_bias, 2),
                           int_at(text_bias, 3),
                           int_at(text_bias, 4),
                           int_at(text_bias, 5)};
  }
  p.num_identities = static_cast<int32_t>(identities.size());
  for (int32_t j = 0; j < p.num_identities; ++j) {
    p.identity[j] = identity_of(py::reinterpret_borrow<py::tuple>(identities[j]));
  }
  if (stage.size() != 0) {
    want_size(stage, 5, "stage");
    p.stage = StageBank{pointer_at<const int32_t>(stage, 0), int_at(stage, 1), int_at(stage, 2),
                        int_at(stage, 3), int_at(stage, 4)};
  }
  return p;
}

// Six addresses in the order of the struct, 0 where one is not wanted; or ().
inline IdAttentionStats stats_of(const py::tuple& t) {
  if (t.size() == 0) return {};
  want_size(t, 6, "stats");
  return {pointer_at<float>(t, 0), pointer_at<float>(t, 1), pointer_at<float>(t, 2),
          pointer_at<float>(t, 3), pointer_at<float>(t, 4), pointer_at<float>(t, 5)};
}

// (g, dq, address of dk_text or 0, dv_text, (dk_id, ...), (dv_id, ...), address of dscale)
inline IdAttentionGrads grads_of(const py::tuple& grads, size_t identities) {
  want_size(grads, 7, "grads");
  IdAttentionGrads to{};
  to.g = head_tensor(py::reinterpret_borrow<py::tuple>(grads[0]), "g");
  to.dq = head_tensor(py::reinterpret_borrow<py::tuple>(grads[1]), "dq");
  to.dk_text = pointer_at<void>(grads, 2);
  to.dv_text = pointer_at<void>(grads, 3);
  const auto dk = py::reinterpret_borrow<py::tuple>(grads[4]),
             dv = py::reinterpret_borrow<py::tuple>(grads[5]);
  want_size(dk, identities, "dk_id");
  want_size(dv, identities, "dv_id");
  for (size_t j = 0; j < identities; ++j) {
    to.dk_id[j] = pointer_at<void>(dk, j);
    to.dv_id[j] = pointer_at<void>(dv, j);
  }
  to.dscale = pointer_at<float>(grads, 6);
  return to;
}

// numbers: (S, B, Bt, L, T, bytes of a row); embeddings: (address, strides of sample and row in bytes); bank:
// (address, strides of stage, sample and token in bytes); positions: (address, strides of sample and token);
// stage: (address or 0, stride).
inline cpu::StageTokensParams stage_tokens_params(const py::tuple& numbers, const py::tuple& embeddings,
                                                  const py::tuple& bank, const py::tuple& positions,
                                                  const py::tuple& stage, uintptr_t out) {
  want_size(numbers, 6, "numbers of stage_tokens");
  want_size(embeddings, 3, "embeddings");
  want_size(bank, 4, "bank");
  want_size(positions, 3, "positions");
  want_size(stage, 2, "stage");
  return {int_at(numbers, 0),
          int_at(numbers, 1),
          int_at(numbers, 2),
          int_at(numbers, 3),
          int_at(numbers, 4),
          int_at(numbers, 5),
          pointer_at<const char>(embeddings, 0),
          int_at(embeddings, 1),
          int_at(embeddings, 2),
          pointer_at<const char>(bank, 0),
          int_at(bank, 1),
          int_at(bank, 2),
          int_at(bank, 3),
          pointer_at<const int32_t>(positions, 0),
          int_at(positions, 1),
          int_at(positions, 2),
          pointer_at<const int32_t>(stage, 0),
          int_at(stage, 1),
          reinterpret_cast<char*>(out)};
}

// numbers: (dtype, S, B, Bt, L, T, E); the others as for the forward, g, embeddings and bank by address.
inline cpu::StageTokensGrads stage_tokens_grads(const py::tuple& numbers, const py::tuple& positions,
                                                const py::tuple& stage, uintptr_t g, uintptr_t embeddings,
                                                uintptr_t bank) {
  want_size(numbers, 7, "numbers of stage_tokens");
  want_size(positions, 3, "positions");
  want_size(stage, 2, "stage");
  return {dtype_of(int_at(numbers, 0)),
          int_at(numbers, 1),
          int_at(numbers, 2),
          int_at(numbers, 3),
          int_at(numbers, 4),
          int_at(numbers, 5),
          int_at(numbers, 6),
          reinterpret_cast<const char*>(g),
          pointer_at<const int32_t>(positions, 0),
          int_at(positions, 1),
          int_at(positions, 2),
          pointer_at<const int32_t>(stage, 0),
          int_at(stage, 1),
          reinterpret_cast<char*>(embeddings),
          reinterpret_cast<float*>(bank)};
}

// numbers: (faces, H, W, filter, dtype, rounded, bgr, address of picture_of or 0, address of matrices);
// pictures: (address, height, width, strides of y, x, channel) each; out: (address, strides of face, channel,
// y, x); colours: fill, mean, std, each red, green, blue
inline AlignFaceParams chip_params(const py::tuple& numbers, const py::tuple& pictures, const py::tuple& out,
                                   const py::tuple& colours) {
  want_size(numbers, 9, "align_face: numbers");
  want_size(out, 5, "align_face: out");
  want_size(colours, 9, "align_face: colours");
  AlignFaceParams p{};
  p.faces = int_at(numbers, 0), p.height = int_at(numbers, 1), p.width = int_at(numbers, 2);
  p.filter = static_cast<ChipFilter>(int_at(numbers, 3));
  p.type = static_cast<ChipType>(int_at(numbers, 4));
  p.rounded = static_cast<int32_t>(int_at(numbers, 5)), p.bgr = static_cast<int32_t>(int_at(numbers, 6));
  p.picture_of = pointer_at<const int32_t>(numbers, 7);
  p.matrix = pointer_at<const double>(numbers, 8);
  if (pictures.empty() || pictures.size() > kMaxPictures)
    throw py::value_error("align_face: 1 to 16 pictures");
  p.num_pictures = static_cast<int32_t>(pictures.size());
  for (int32_t i = 0; i < p.num_pictures; ++i) {
    const auto t = py::reinterpret_borrow<py::tuple>(pictures[i]);
    want_size(t, 6, "align_face: a picture");
    p.picture[i] = Picture{pointer_at<const uint8_t>(t, 0),
                           int_at(t, 1),
                           int_at(t, 2),
                           int_at(t, 3),
                           int_at(t, 4),
                           int_at(t, 5)};
  }
  p.out = pointer_at<void>(out, 0);
  p.stride_face = int_at(out, 1), p.stride_channel = int_at(out, 2);
  p.stride_y = int_at(out, 3), p.stride_x = int_at(out, 4);
  for (int c = 0; c < 3; ++c) {
    p.fill[c] = colours[c].cast<float>(), p.mean[c] = colours[3 + c].cast<float>();
    p.std[c] = colours[6 + c].cast<float>();
  }
  return p;
}

// numbers of the losses: (dtype, B, H, Lq, Lt, D)
template <class Params>
Params loss_params(const py::tuple& numbers, const py::tuple& q, const py::tuple& k) {
  want_size(numbers, 6, "numbers of a loss");
  Params p{};
  p.dtype = dtype_of(int_at(numbers, 0));
  p.batch = int_at(numbers, 1);
  p.heads = int_at(numbers, 2);
  p.lq = int_at(numbers, 3);
  p.lt = int_at(numbers, 4);
  p.head_dim = int_at(numbers, 5);
  p.q = head_tensor(q, "q");
  p.k = head_tensor(k, "k");
  return p;
}

// weight: (address, strides of sample and token)
inline TokenLossParams token_loss_params(const py::tuple& numbers, const py::tuple& q, const py::tuple& k,
                                         const py::tuple& k_ref, const py::tuple& weight) {
  auto p = loss_params<TokenLossParams>(numbers, q, k);
  want_size(weight, 3, "weight");
  p.k_ref = head_tensor(k_ref, "k_ref");
  p.weight = pointer_at<const float>(weight, 0);
  p.weight_stride_batch = int_at(weight, 1);
  p.weight_stride_token = int_at(weight, 2);
  return p;
}

}  // namespace tuples
}  // namespace idcore
