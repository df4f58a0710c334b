// Registers the C++ functions with torch, under the namespace that the build chooses. No logic here.

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>

#ifndef STEPKTO_NAMESPACE
#define STEPKTO_NAMESPACE stepkto_kernels_native
#endif
#define STEPKTO_LIBRARY(name, m) TORCH_LIBRARY(name, m)  // expands the macro before TORCH_LIBRARY pastes it

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

STEPKTO_LIBRARY(STEPKTO_NAMESPACE, m) {
  m.def(
      "step_kto(Tensor logp, Tensor ref_logp, Tensor cu_seqlens, Tensor cu_steps, Tensor labels, Tensor step_labels,"
      " Tensor kl, Tensor step_kl, Tensor? num_completions, Tensor? num_supervised, float beta, float step_beta,"
      " float desirable_weight, float undesirable_weight, float step_desirable_weight,"
      " float step_undesirable_weight, float outcome_weight, float step_weight, str step_reduction,"
      " str after_first_error) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(stepkto::step_kto)));
  m.def(
      "linear_logp(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, float logit_scale, float? softcap,"
      " float temperature, int ignore_index, bool with_entropy, bool with_stats)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(stepkto::linear_logp)));
  m.def(
      "linear_logp_backward(Tensor grad_logp, Tensor? grad_entropy, Tensor hidden, Tensor weight, Tensor target,"
      " Tensor logp, Tensor lse, Tensor tile_lse, Tensor? entropy, Tensor? bias, float logit_scale, float? softcap,"
      " float temperature, int ignore_index, float filter_eps, bool need_hidden, bool need_weight, bool need_bias,"
      " int workspace_bytes) -> (Tensor, Tensor, Tensor, Tensor)",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(stepkto::linear_logp_backward)));
  m.def(
      "linear_logp_kl(Tensor hidden, Tensor weight, Tensor ref_hidden, Tensor ref_weight, Tensor target, Tensor? bias,"
      " Tensor? ref_bias, float logit_scale, float? softcap, float temperature, int ignore_index)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(stepkto::linear_logp_kl)));
  m.def("reference_points(Tensor values) -> Tensor",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(stepkto::reference_points)));
  m.def("instruction_set() -> str", TORCH_FN(stepkto::instruction_set));
}
