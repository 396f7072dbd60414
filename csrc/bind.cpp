// The Python module idcore._C: the only file that sees pybind11, and the table of contents of csrc/.
//
// Tensors arrive as tuples of integers, so that neither PyTorch nor NumPy is needed to build:
//   (address, batch, stride of batch, stride of head, stride of row), strides in elements.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/align_face_tiles.h"
#include "cpu/dispatch.h"
#include "cpu/id_attention_bwd.h"
#include "cpu/id_attention_fwd.h"
#include "cpu/stage_tokens.h"
#include "cpu/token_losses.h"
#include "cpu/workspace.h"
#include "id_attention.h"
#if defined(IDCORE_WITH_CUDA)
#include "cuda/align_face_launch.h"
#include "cuda/device.h"
#include "cuda/id_attention_fwd.h"
#endif

namespace py = pybind11;

namespace {

using idcore::DType;
using idcore::HeadTensor;
using idcore::IdAttentionParams;
using idcore::Identity;
using idcore::Merge;

int64_t int_at(const py::tuple& t, size_t i) {
  const int64_t x = PyLong_AsLongLong(PyTuple_GET_ITEM(t.ptr(), static_cast<Py_ssize_t>(i)));
  if (x == -1 && PyErr_Occurred()) throw py::error_already_set();
  return x;
}

template <class T>
T* pointer_at(const py::tuple& t, size_t i) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(int_at(t, i)));
}

void want_size(const py::tuple& t, size_t size, const char* name) {
  if (t.size() != size) {
    throw py::value_error(std::string(name) + " must be a tuple of " + std::to_string(size) + ", got " +
                          std::to_string(t.size()));
  }
}

DType dtype_of(int64_t x) {
  if (x < 0 || x > 2)
    throw py::value_error("id_attention: dtype must be 0 (float32), 1 (bfloat16) or 2 (float16)");
  return static_cast<DType>(x);
}

HeadTensor head_tensor(const py::tuple& t, const char* name) {
  want_size(t, 5, name);
  return HeadTensor{pointer_at<void>(t, 0), int_at(t, 1), int_at(t, 2), int_at(t, 3), int_at(t, 4)};
}

// (k, v, Li, scale, address of scales or 0, their stride, address of mask or 0, its strides of batch and row)
Identity identity_of(const py::tuple& t) {
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
IdAttentionParams params_of(const py::tuple& numbers, const py::tuple& q, const py::tuple& k_text,
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
  if (p.head_dim > idcore::kMaxHeadDim) throw py::value_error("id_attention: head dim above 256");
  if (identities.size() > idcore::kMaxIdentities)
    throw py::value_error("id_attention: more than 16 identities");
  p.q = head_tensor(q, "q");
  p.k_text = head_tensor(k_text, "k_text");
  p.v_text = head_tensor(v_text, "v_text");
  p.out = head_tensor(out, "out");
  if (text_bias.size() != 0) {
    want_size(text_bias, 6, "text_bias");
    p.text_bias = idcore::TextBias{pointer_at<const void>(text_bias, 0),
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
    p.stage = idcore::StageBank{pointer_at<const int32_t>(stage, 0), int_at(stage, 1), int_at(stage, 2),
                                int_at(stage, 3), int_at(stage, 4)};
  }
  return p;
}

// Six addresses in the order of the struct, 0 where one is not wanted; or ().
idcore::IdAttentionStats stats_of(const py::tuple& t) {
  if (t.size() == 0) return {};
  want_size(t, 6, "stats");
  return {pointer_at<float>(t, 0), pointer_at<float>(t, 1), pointer_at<float>(t, 2),
          pointer_at<float>(t, 3), pointer_at<float>(t, 4), pointer_at<float>(t, 5)};
}

const idcore::cpu::Kernels& chosen_kernels() {
  const char* error = nullptr;
  const idcore::cpu::Kernels* k = idcore::cpu::chosen(&error);
  if (k == nullptr) throw py::value_error(error);
  return *k;
}

void id_attention_cpu_stats(const py::tuple& numbers, const py::tuple& q, const py::tuple& k_text,
                            const py::tuple& v_text, const py::tuple& out, const py::tuple& text_bias,
                            const py::tuple& identities, const py::tuple& stage, const py::tuple& stats) {
  const IdAttentionParams p = params_of(numbers, q, k_text, v_text, out, text_bias, identities, stage);
  const idcore::IdAttentionStats wanted = stats_of(stats);
  const idcore::cpu::Kernels& kernels = chosen_kernels();
  py::gil_scoped_release release;
  idcore::cpu::id_attention_fwd(p, kernels, wanted);
}

void id_attention_cpu(const py::tuple& numbers, const py::tuple& q, const py::tuple& k_text,
                      const py::tuple& v_text, const py::tuple& out, const py::tuple& text_bias,
                      const py::tuple& identities, const py::tuple& stage) {
  id_attention_cpu_stats(numbers, q, k_text, v_text, out, text_bias, identities, stage, py::tuple());
}

// `out` is ignored. grads: (g, dq, address of dk_text or 0, dv_text, (dk_id, ...), (dv_id, ...), address of
// dscale).
void id_attention_cpu_bwd(const py::tuple& numbers, const py::tuple& q, const py::tuple& k_text,
                          const py::tuple& v_text, const py::tuple& out, const py::tuple& text_bias,
                          const py::tuple& identities, const py::tuple& stage, const py::tuple& stats,
                          const py::tuple& grads) {
  const IdAttentionParams p = params_of(numbers, q, k_text, v_text, out, text_bias, identities, stage);
  const idcore::IdAttentionStats known = stats_of(stats);
  want_size(grads, 7, "grads");
  idcore::IdAttentionGrads to{};
  to.g = head_tensor(py::reinterpret_borrow<py::tuple>(grads[0]), "g");
  to.dq = head_tensor(py::reinterpret_borrow<py::tuple>(grads[1]), "dq");
  to.dk_text = pointer_at<void>(grads, 2);
  to.dv_text = pointer_at<void>(grads, 3);
  const auto dk = py::reinterpret_borrow<py::tuple>(grads[4]),
             dv = py::reinterpret_borrow<py::tuple>(grads[5]);
  want_size(dk, identities.size(), "dk_id");
  want_size(dv, identities.size(), "dv_id");
  for (size_t j = 0; j < identities.size(); ++j) {
    to.dk_id[j] = pointer_at<void>(dk, j);
    to.dv_id[j] = pointer_at<void>(dv, j);
  }
  to.dscale = pointer_at<float>(grads, 6);
  const idcore::cpu::Kernels& kernels = chosen_kernels();
  py::gil_scoped_release release;
  idcore::cpu::id_attention_bwd(p, known, to, kernels);
}

// numbers: (faces, H, W, filter, dtype, rounded, bgr, address of picture_of or 0, address of matrices);
// pictures: (address, height, width, strides of y, x, channel) each; out: (address, strides of face, channel,
// y, x); colours: fill, mean, std, each red, green, blue
idcore::AlignFaceParams chip_params(const py::tuple& numbers, const py::tuple& pictures, const py::tuple& out,
                                    const py::tuple& colours) {
  want_size(numbers, 9, "align_face: numbers");
  want_size(out, 5, "align_face: out");
  want_size(colours, 9, "align_face: colours");
  idcore::AlignFaceParams p{};
  p.faces = int_at(numbers, 0), p.height = int_at(numbers, 1), p.width = int_at(numbers, 2);
  p.filter = static_cast<idcore::ChipFilter>(int_at(numbers, 3));
  p.type = static_cast<idcore::ChipType>(int_at(numbers, 4));
  p.rounded = static_cast<int32_t>(int_at(numbers, 5)), p.bgr = static_cast<int32_t>(int_at(numbers, 6));
  p.picture_of = pointer_at<const int32_t>(numbers, 7);
  p.matrix = pointer_at<const double>(numbers, 8);
  if (pictures.empty() || pictures.size() > idcore::kMaxPictures)
    throw py::value_error("align_face: 1 to 16 pictures");
  p.num_pictures = static_cast<int32_t>(pictures.size());
  for (int32_t i = 0; i < p.num_pictures; ++i) {
    const auto t = py::reinterpret_borrow<py::tuple>(pictures[i]);
    want_size(t, 6, "align_face: a picture");
    p.picture[i] = idcore::Picture{pointer_at<const uint8_t>(t, 0),
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

void align_face_cpu(const py::tuple& numbers, const py::tuple& pictures, const py::tuple& out,
                    const py::tuple& colours) {
  const idcore::AlignFaceParams p = chip_params(numbers, pictures, out, colours);
  const idcore::cpu::Kernels& kernels = chosen_kernels();
  py::gil_scoped_release release;
  idcore::cpu::align_face(p, kernels);
}

// numbers: (S, B, Bt, L, T, bytes of a row); embeddings: (address, strides of sample and row in bytes); bank:
// (address, strides of stage, sample and token in bytes); positions: (address, strides of sample and token);
// stage: (address or 0, stride).
void stage_tokens_cpu(const py::tuple& numbers, const py::tuple& embeddings, const py::tuple& bank,
                      const py::tuple& positions, const py::tuple& stage, uintptr_t out) {
  want_size(numbers, 6, "numbers of stage_tokens");
  want_size(embeddings, 3, "embeddings");
  want_size(bank, 4, "bank");
  want_size(positions, 3, "positions");
  want_size(stage, 2, "stage");
  const idcore::cpu::StageTokensParams p{int_at(numbers, 0),
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
  py::gil_scoped_release release;
  idcore::cpu::stage_tokens(p);
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
idcore::TokenLossParams token_loss_params(const py::tuple& numbers, const py::tuple& q, const py::tuple& k,
                                          const py::tuple& k_ref, const py::tuple& weight) {
  auto p = loss_params<idcore::TokenLossParams>(numbers, q, k);
  want_size(weight, 3, "weight");
  p.k_ref = head_tensor(k_ref, "k_ref");
  p.weight = pointer_at<const float>(weight, 0);
  p.weight_stride_batch = int_at(weight, 1);
  p.weight_stride_token = int_at(weight, 2);
  return p;
}

double token_loss_cpu(const py::tuple& numbers, const py::tuple& q, const py::tuple& k,
                      const py::tuple& k_ref, const py::tuple& weight) {
  const idcore::TokenLossParams p = token_loss_params(numbers, q, k, k_ref, weight);
  const idcore::cpu::Kernels& kernels = chosen_kernels();
  py::gil_scoped_release release;
  return idcore::cpu::token_loss_fwd(p, kernels);
}

void token_loss_cpu_bwd(const py::tuple& numbers, const py::tuple& q, const py::tuple& k,
                        const py::tuple& k_ref, const py::tuple& weight, float factor, const py::tuple& dq,
                        uintptr_t dk) {
  const idcore::TokenLossParams p = token_loss_params(numbers, q, k, k_ref, weight);
  const idcore::TokenLossGrads grads{factor, head_tensor(dq, "dq"), reinterpret_cast<void*>(dk)};
  const idcore::cpu::Kernels& kernels = chosen_kernels();
  py::gil_scoped_release release;
  idcore::cpu::token_loss_bwd(p, grads, kernels);
}

void semantic_cpu(const py::tuple& numbers, const py::tuple& q, const py::tuple& k, uintptr_t out,
                  uintptr_t lse) {
  auto p = loss_params<idcore::SemanticParams>(numbers, q, k);
  p.out = reinterpret_cast<void*>(out);
  p.lse = reinterpret_cast<float*>(lse);
  const idcore::cpu::Kernels& kernels = chosen_kernels();
  py::gil_scoped_release release;
  idcore::cpu::semantic_fwd(p, kernels);
}

void semantic_cpu_bwd(const py::tuple& numbers, const py::tuple& q, const py::tuple& k, const py::tuple& g,
                      uintptr_t lse, uintptr_t delta, const py::tuple& dq, uintptr_t dk) {
  const auto p = loss_params<idcore::SemanticParams>(numbers, q, k);
  const idcore::SemanticGrads grads{head_tensor(g, "g"), reinterpret_cast<const float*>(lse),
                                    reinterpret_cast<const float*>(delta), head_tensor(dq, "dq"),
                                    reinterpret_cast<void*>(dk)};
  const idcore::cpu::Kernels& kernels = chosen_kernels();
  py::gil_scoped_release release;
  idcore::cpu::semantic_bwd(p, grads, kernels);
}

#if defined(IDCORE_WITH_CUDA)
using Tuples = const py::tuple&;

void check_launch(const char* what, int error) {
  if (error == 0) return;
  throw std::runtime_error(std::string(what) + ": CUDA error " + std::to_string(error) + ": " +
                           idcore::cuda::error_text(error));
}

py::object id_attention_cuda_refusal(Tuples numbers, Tuples q, Tuples k_text, Tuples v_text, Tuples out,
                                     Tuples text_bias, Tuples identities, Tuples stage) {
  const char* reason = idcore::cuda::id_attention_refusal(
      params_of(numbers, q, k_text, v_text, out, text_bias, identities, stage));
  return reason == nullptr ? py::object(py::none()) : py::object(py::str(reason));
}

py::tuple id_attention_cuda_plan(Tuples numbers, Tuples q, Tuples k_text, Tuples v_text, Tuples out,
                                 Tuples text_bias, Tuples identities, Tuples stage) {
  const idcore::cuda::Plan plan = idcore::cuda::id_attention_plan(
      params_of(numbers, q, k_text, v_text, out, text_bias, identities, stage));
  return py::make_tuple(plan.workspace, plan.launches);
}

void id_attention_cuda(Tuples numbers, Tuples q, Tuples k_text, Tuples v_text, Tuples out, Tuples text_bias,
                       Tuples identities, Tuples stage, uintptr_t workspace, uintptr_t stream) {
  const IdAttentionParams p = params_of(numbers, q, k_text, v_text, out, text_bias, identities, stage);
  int error = 0;
  {
    py::gil_scoped_release release;
    error = idcore::cuda::id_attention_fwd(p, reinterpret_cast<void*>(workspace),
                                           reinterpret_cast<void*>(stream));
  }
  check_launch("id_attention_cuda", error);
}

void align_face_cuda(Tuples numbers, Tuples pictures, Tuples out, Tuples colours, uintptr_t stream) {
  const idcore::AlignFaceParams p = chip_params(numbers, pictures, out, colours);
  int error = 0;
  {
    py::gil_scoped_release release;
    error = idcore::cuda::align_face(p, reinterpret_cast<void*>(stream));
  }
  check_launch("align_face_cuda", error);
}
#endif

void set_cpu_isa(const std::string& name) {
  if (!idcore::cpu::choose(name.c_str())) {
    throw py::value_error("set_cpu_isa: '" + name + "' was not compiled in or this machine lacks it");
  }
}

double cpu_peak_gflops(int threads, double seconds, bool bf16) {
  const idcore::cpu::Kernels& kernels = chosen_kernels();
  py::gil_scoped_release release;
  return idcore::cpu::measure_peak(kernels, threads, seconds, bf16 && kernels.has_pairs);
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  for (size_t at = 0; at < text.size();) {
    const size_t comma = std::min(text.find(',', at), text.size());
    parts.push_back(text.substr(at, comma - at));
    at = comma + 1;
  }
  return parts;
}

std::vector<std::string> compiled_isas() {
  const char* names[idcore::cpu::kMaxIsas];
  return std::vector<std::string>(names, names + idcore::cpu::compiled_isas(names));
}

std::vector<std::string> usable_isas() {
  const idcore::cpu::Kernels* all[idcore::cpu::kMaxIsas];
  std::vector<std::string> names;
  for (int i = 0, n = idcore::cpu::usable_isas(all); i < n; ++i) names.push_back(all[i]->name);
  return names;
}

py::dict build_info() {
  py::dict info;
  info["isa"] = compiled_isas();
  info["isa_usable"] = usable_isas();
  info["isa_chosen"] = chosen_kernels().name;
  info["openmp"] = idcore::cpu::has_openmp();
  info["threads"] = idcore::cpu::max_threads();
  info["compiler"] = IDCORE_COMPILER;
  info["sanitize"] = IDCORE_SANITIZE;
  info["cuda_archs"] = split(IDCORE_CUDA_ARCHS);
  info["cuda_compiler"] = IDCORE_CUDA_COMPILER;
  return info;
}

// Devices that the CUDA kernels could run on; an empty list without a driver or a GPU. Raises on other
// failures.
py::list cuda_devices() {
  py::list devices;
#if defined(IDCORE_WITH_CUDA)
  int error = 0;
  const char* text = nullptr;
  const int count = idcore::cuda::device_count(&error, &text);
  if (error != 0)
    throw std::runtime_error(std::string("cuda_devices: CUDA error ") + std::to_string(error) + ": " + text);
  for (int i = 0; i < count; ++i) {
    idcore::cuda::DeviceInfo d;
    if (!idcore::cuda::device_info(i, &d)) continue;
    py::dict entry;
    entry["name"] = d.name;
    entry["capability"] = py::make_tuple(d.major, d.minor);
    entry["multiprocessors"] = d.multiprocessors;
    entry["memory_bytes"] = d.memory_bytes;
    devices.append(entry);
  }
#endif
  return devices;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of idcore. Use idcore.ops; this module trusts its arguments.";
  m.def("build_info", &build_info, "What was compiled, and what of it this machine can run.");
  m.def("id_attention_cpu", &id_attention_cpu,
        "Forward of id_attention on the CPU; see csrc/bind.cpp for the tuples.");
  m.def("id_attention_cpu_stats", &id_attention_cpu_stats,
        "As id_attention_cpu; also the row statistics for backward, six addresses.");
  m.def("id_attention_cpu_bwd", &id_attention_cpu_bwd,
        "Gradients of id_attention on the CPU from its statistics; see csrc/bind.cpp for the tuples.");
  m.def("align_face_cpu", &align_face_cpu, "Face chips on the CPU; see csrc/bind.cpp for the tuples.");
  m.def("token_loss_cpu", &token_loss_cpu, "Weighted sum of squared differences of two attention maps.");
  m.def("token_loss_cpu_bwd", &token_loss_cpu_bwd, "Its gradients dq and dk.");
  m.def("semantic_cpu", &semantic_cpu,
        "softmax over image rows of k q^T / sqrt(D), times q; and the logarithms.");
  m.def("semantic_cpu_bwd", &semantic_cpu_bwd, "Its gradients dq and dk.");
  m.def("stage_tokens_cpu", &stage_tokens_cpu, "Word embeddings with rows replaced, once per stage.");
  m.def("compiled_isas", &compiled_isas, "Instruction sets that were compiled in, weakest first.");
  m.def("usable_isas", &usable_isas, "Those of them that this machine can run.");
  m.def("set_cpu_isa", &set_cpu_isa, py::arg("name"),
        "Force an instruction set; '' goes back to the default.");
  m.def("cpu_isa", [] { return chosen_kernels().name; }, "The instruction set in use.");
  m.def("cpu_peak_gflops", &cpu_peak_gflops, py::arg("threads") = 0, py::arg("seconds") = 0.3,
        py::arg("bf16") = false,
        "Multiply-add rate in registers of the instruction set in use, over all given threads, in GFLOP/s.");
  m.def("release_workspace", &idcore::cpu::release_workspace, "Free this thread's workspace; returns bytes.");
#if defined(IDCORE_WITH_CUDA)
  m.def("id_attention_cuda", &id_attention_cuda,
        "Forward on the current CUDA device: the tuples of id_attention_cpu, workspace address, stream.");
  m.def("align_face_cuda", &align_face_cuda,
        "Face chips on the current CUDA device: the tuples of align_face_cpu, stream.");
  m.def("id_attention_cuda_refusal", &id_attention_cuda_refusal,
        "None, or why the CUDA kernels cannot run the call.");
  m.def("id_attention_cuda_plan", &id_attention_cuda_plan,
        "Bytes of device scratch memory for the call, and how many kernels it launches.");
#endif
  m.def("cuda_devices", &cuda_devices,
        "CUDA devices by name and capability; empty without a driver or a GPU.");
}
