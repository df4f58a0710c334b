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

}  // namespace stepkto

STEPKTO_LIBRARY(STEPKTO_NAMESPACE, m) {
  m.def(
      "step_kto(Tensor logp, Tensor ref_logp, Tensor cu_seqlens, Tensor cu_steps, Tensor labels, Tensor step_labels,"
      " Tensor kl, Tensor step_kl, Tensor? num_completions, Tensor? num_supervised, float beta, float step_beta,"
      " float desirable_weight, float undesirable_weight, float step_desirable_weight,"
      " float step_undesirable_weight, float outcome_weight, float step_weight, str step_reduction,"
      " str after_first_error) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(stepkto::step_kto)));
}
