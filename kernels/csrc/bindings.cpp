// Registers the C++ functions with torch, under a namespace that each copy of the package chooses.

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <exception>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#ifdef TORCH_EXTENSION_NAME
#include "registration.h"  // kernel-builder's, as is that name
#endif

namespace stepkto {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> step_kto(
    const at::Tensor& logp, const at::Tensor& ref_logp, const at::Tensor& cu_seqlens, const at::Tensor& cu_steps,
    const at::Tensor& labels, const at::Tensor& step_labels, const at::Tensor& kl, const at::Tensor& step_kl,
    const std::optional<at::Tensor>& num_completions, const std::optional<at::Tensor>& num_supervised, double beta,
    double step_beta, double desirable_weight, double undesirable_weight, double step_desirable_weight,
    double step_undesirable_weight, double outcome_weight, double step_weight, const std::string& step_reduction,
    const std::string& after_first_error);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_logp(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& target, const std::optional<at::Tensor>& bias,
    double logit_scale, std::optional<double> softcap, double temperature, int64_t ignore_index, bool with_entropy,
    bool with_stats);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_logp_backward(
    const at::Tensor& grad_logp, const std::optional<at::Tensor>& grad_entropy, const at::Tensor& hidden,
    const at::Tensor& weight, const at::Tensor& target, const at::Tensor& logp, const at::Tensor& lse,
    const at::Tensor& tile_lse, const std::optional<at::Tensor>& entropy, const std::optional<at::Tensor>& bias,
    double logit_scale, std::optional<double> softcap, double temperature, int64_t ignore_index, double filter_eps,
    bool need_hidden, bool need_weight, bool need_bias, int64_t workspace_bytes);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_logp_kl(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& ref_hidden, const at::Tensor& ref_weight,
    const at::Tensor& target, const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& ref_bias,
    double logit_scale, std::optional<double> softcap, double temperature, int64_t ignore_index);

at::Tensor reference_points(const at::Tensor& values);

std::string instruction_set();

}  // namespace stepkto

static void define(torch::Library& m) {
  m.def(
      "native_step_kto(Tensor logp, Tensor ref_logp, Tensor cu_seqlens, Tensor cu_steps, Tensor labels,"
      " Tensor step_labels, Tensor kl, Tensor step_kl, Tensor? num_completions, Tensor? num_supervised, float beta,"
      " float step_beta, float desirable_weight, float undesirable_weight, float step_desirable_weight,"
      " float step_undesirable_weight, float outcome_weight, float step_weight, str step_reduction,"
      " str after_first_error) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(stepkto::step_kto)));
  m.def(
      "native_linear_logp(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, float logit_scale, float? softcap,"
      " float temperature, int ignore_index, bool with_entropy, bool with_stats)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(stepkto::linear_logp)));
  m.def(
      "native_linear_logp_backward(Tensor grad_logp, Tensor? grad_entropy, Tensor hidden, Tensor weight, Tensor target,"
      " Tensor logp, Tensor lse, Tensor tile_lse, Tensor? entropy, Tensor? bias, float logit_scale, float? softcap,"
      " float temperature, int ignore_index, float filter_eps, bool need_hidden, bool need_weight, bool need_bias,"
      " int workspace_bytes) -> (Tensor, Tensor, Tensor, Tensor)",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(stepkto::linear_logp_backward)));
  m.def(
      "native_linear_logp_kl(Tensor hidden, Tensor weight, Tensor ref_hidden, Tensor ref_weight, Tensor target,"
      " Tensor? bias, Tensor? ref_bias, float logit_scale, float? softcap, float temperature, int ignore_index)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(stepkto::linear_logp_kl)));
  m.def("native_reference_points(Tensor values) -> Tensor",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(stepkto::reference_points)));
  m.def("native_instruction_set() -> str", TORCH_FN(stepkto::instruction_set));
}

#ifdef TORCH_EXTENSION_NAME
TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, m) { define(m); }
REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
#else
// Registers the functions under `name`, once. Returns what went wrong, or nullptr; the text lives until the next call.
extern "C" __attribute__((visibility("default"))) const char* stepkto_register(const char* name) {
  static std::mutex mutex;
  static std::map<std::string, torch::Library> registered;
  static std::string reason;
  const std::lock_guard<std::mutex> lock(mutex);
  if (registered.count(name)) return nullptr;
  try {
    torch::Library library(torch::Library::FRAGMENT, name, std::nullopt, __FILE__, __LINE__);
    define(library);
    registered.emplace(name, std::move(library));
    return nullptr;
  } catch (const std::exception& error) {
    reason = error.what();
    return reason.c_str();
  }
}
#endif
