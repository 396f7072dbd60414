// The Python module idcore._C: the only source that sees pybind11, and the table of contents of csrc/. What
// the tuples hold stands in bind_tuples.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind_tuples.h"
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

namespace {

using idcore::IdAttentionParams;
using namespace idcore::tuples;

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

// `out` is ignored.
void id_attention_cpu_bwd(const py::tuple& numbers, const py::tuple& q, const py::tuple& k_text,
                          const py::tuple& v_text, const py::tuple& out, const py::tuple& text_bias,
                          const py::tuple& identities, const py::tuple& stage, const py::tuple& stats,
                          const py::tuple& grads) {
  const IdAttentionParams p = params_of(numbers, q, k_text, v_text, out, text_bias, identities, stage);
  const idcore::IdAttentionStats known = stats_of(stats);
  const idcore::IdAttentionGrads to = grads_of(grads, identities.size());
  const idcore::cpu::Kernels& kernels = chosen_kernels();
  py::gil_scoped_release release;
  idcore::cpu::id_attention_bwd(p, known, to, kernels);
}

void align_face_cpu(const py::tuple& numbers, const py::tuple& pictures, const py::tuple& out,
                    const py::tuple& colours) {
  const idcore::AlignFaceParams p = chip_params(numbers, pictures, out, colours);
  const idcore::cpu::Kernels& kernels = chosen_kernels();
  py::gil_scoped_release release;
  idcore::cpu::align_face(p, kernels);
}

void stage_tokens_cpu(const py::tuple& numbers, const py::tuple& embeddings, const py::tuple& bank,
                      const py::tuple& positions, const py::tuple& stage, uintptr_t out) {
  const idcore::cpu::StageTokensParams p =
      stage_tokens_params(numbers, embeddings, bank, positions, stage, out);
  py::gil_scoped_release release;
  idcore::cpu::stage_tokens(p);
}

void stage_tokens_cpu_bwd(const py::tuple& numbers, const py::tuple& positions, const py::tuple& stage,
                          uintptr_t g, uintptr_t embeddings, uintptr_t bank) {
  const idcore::cpu::StageTokensGrads p = stage_tokens_grads(numbers, positions, stage, g, embeddings, bank);
  const idcore::cpu::Kernels& kernels = chosen_kernels();
  py::gil_scoped_release release;
  idcore::cpu::stage_tokens_bwd(p, kernels);
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

// False where nothing was enqueued because the plan has changed since the workspace was sized.
bool id_attention_cuda(Tuples numbers, Tuples q, Tuples k_text, Tuples v_text, Tuples out, Tuples text_bias,
                       Tuples identities, Tuples stage, uintptr_t workspace, int64_t bytes,
                       uintptr_t stream) {
  const IdAttentionParams p = params_of(numbers, q, k_text, v_text, out, text_bias, identities, stage);
  int error = 0;
  {
    py::gil_scoped_release release;
    error = idcore::cuda::id_attention_fwd(p, reinterpret_cast<void*>(workspace), bytes,
                                           reinterpret_cast<void*>(stream));
  }
  if (error == idcore::cuda::kPlanAgain) return false;
  check_launch("id_attention_cuda", error);
  return true;
}

py::object id_attention_cuda_problem() {
  const int error = idcore::cuda::id_attention_problem();
  if (error == 0) return py::none();
  return py::str("CUDA error " + std::to_string(error) + ": " + idcore::cuda::error_text(error));
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
        "Forward of id_attention on the CPU; see csrc/bind_tuples.h for the tuples.");
  m.def("id_attention_cpu_stats", &id_attention_cpu_stats,
        "As id_attention_cpu; also the row statistics for backward, six addresses.");
  m.def("id_attention_cpu_bwd", &id_attention_cpu_bwd,
        "Gradients of id_attention on the CPU from its statistics; see csrc/bind_tuples.h for the tuples.");
  m.def("align_face_cpu", &align_face_cpu, "Face chips on the CPU; see csrc/bind_tuples.h for the tuples.");
  m.def("token_loss_cpu", &token_loss_cpu, "Weighted sum of squared differences of two attention maps.");
  m.def("token_loss_cpu_bwd", &token_loss_cpu_bwd, "Its gradients dq and dk.");
  m.def("semantic_cpu", &semantic_cpu,
        "softmax over image rows of k q^T / sqrt(D), times q; and the logarithms.");
  m.def("semantic_cpu_bwd", &semantic_cpu_bwd, "Its gradients dq and dk.");
  m.def("stage_tokens_cpu", &stage_tokens_cpu, "Word embeddings with rows replaced, once per stage.");
  m.def("stage_tokens_cpu_bwd", &stage_tokens_cpu_bwd,
        "Its gradients: the embeddings' in the dtype of g, the tokens' in float32.");
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
        "Forward on the current CUDA device: the tuples of id_attention_cpu, workspace address and bytes, "
        "stream. False: nothing was enqueued, plan again.");
  m.def("id_attention_cuda_together", &idcore::cuda::id_attention_together, py::arg("allowed"),
        "Whether ortho may be one cooperative launch where it fits; returns what was so before.");
  m.def("id_attention_cuda_problem", &id_attention_cuda_problem,
        "None, or why no kernel of this build runs on the current device.");
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
