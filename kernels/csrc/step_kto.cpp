// The Step-KTO objective over packed tokens on the CPU: see torch-ext/stepkto_kernels/step_kto/README.md.
//
// Two passes over the tokens: step sums, then the coefficients. Completions are independent, so both passes run over
// them in parallel; what crosses completions is summed serially afterwards. Every sum thus has one fixed order, and
// the results do not depend on the number of threads.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace stepkto {
namespace {

constexpr int64_t GRAIN_TOKENS = 16384;  // of work a thread should have: about 10 us, what waking it costs

// value function: lam - v and its derivative in r, where v = lam * sigmoid(x), so lam - v = lam * sigmoid(-x)
struct Term {
  double loss, slope;
};

Term value_term(double r, bool desirable, double beta, double z, double desirable_weight, double undesirable_weight) {
  const double sign = desirable ? 1.0 : -1.0;
  const double lam = desirable ? desirable_weight : undesirable_weight;
  const double x = beta * sign * (r - z);
  const double loss = lam / (1.0 + std::exp(x));
  return {loss, -beta * sign * loss / (1.0 + std::exp(-x))};
}

// Sum of logp - ref_logp over [start, stop): differences in the tokens' type, sums in fp64. Four fixed lanes let the
// additions overlap; without them the latency of one chain of additions is the whole cost.
template <typename scalar_t>
double sum_log_ratio(const scalar_t* logp, const scalar_t* ref_logp, int64_t start, int64_t stop) {
  double lane[4] = {0, 0, 0, 0};
  int64_t n = start;
  for (; n + 4 <= stop; n += 4) {
    for (int k = 0; k < 4; ++k) lane[k] += static_cast<double>(scalar_t(logp[n + k] - ref_logp[n + k]));
  }
  for (int k = 0; n < stop; ++n, ++k) lane[k] += static_cast<double>(scalar_t(logp[n] - ref_logp[n]));
  return (lane[0] + lane[1]) + (lane[2] + lane[3]);
}

double inverse(double count) { return count > 0 ? 1.0 / count : 0.0; }

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> step_kto(
    const at::Tensor& logp, const at::Tensor& ref_logp, const at::Tensor& cu_seqlens, const at::Tensor& cu_steps,
    const at::Tensor& labels, const at::Tensor& step_labels, const at::Tensor& kl, const at::Tensor& step_kl,
    const std::optional<at::Tensor>& num_completions, const std::optional<at::Tensor>& num_supervised, double beta,
    double step_beta, double desirable_weight, double undesirable_weight, double step_desirable_weight,
    double step_undesirable_weight, double outcome_weight, double step_weight, const std::string& step_reduction,
    const std::string& after_first_error) {
  const int64_t B = labels.numel(), S = step_labels.numel(), N = logp.numel();
  const auto logp_N = logp.contiguous(), ref_logp_N = ref_logp.contiguous();
  const auto seqlens = cu_seqlens.contiguous(), steps = cu_steps.contiguous();
  const auto labels_B = labels.contiguous(), step_labels_S = step_labels.contiguous();
  const int32_t* cu_seq = seqlens.const_data_ptr<int32_t>();
  const int32_t* cu_step = steps.const_data_ptr<int32_t>();
  const bool* label = labels_B.const_data_ptr<bool>();
  const int8_t* step_label = step_labels_S.const_data_ptr<int8_t>();
  const double z = kl.item<double>(), z_step = step_kl.item<double>();
  const bool mean_over_steps = step_reduction == "mean", mask = after_first_error == "mask";

  // first step of each completion, and the number of its labelled steps after masking
  std::vector<int64_t> first_step(B + 1, S), labelled(B, 0), last_labelled(B, 0);
  int64_t supervised = 0;
  for (int64_t i = 0, h = 0; i < B; ++i) {
    first_step[i] = h;
    bool open = true;  // false after the first incorrect step, under "mask"
    for (; h < S && cu_step[h] < cu_seq[i + 1]; ++h) {
      if (!open || step_label[h] == -1) continue;
      ++labelled[i];
      last_labelled[i] = h;
      open = !(mask && step_label[h] == 0);
    }
    supervised += labelled[i] > 0;
  }
  const double per_completion = inverse(num_completions ? num_completions->item<double>() : double(B));
  const double per_supervised = inverse(num_supervised ? num_supervised->item<double>() : double(supervised));

  const auto like = logp_N.options();
  auto loss = at::empty({}, like), outcome_loss = at::empty({}, like), step_loss = at::empty({}, like);
  auto r_B = at::empty({B}, like), r_S = at::empty({S}, like), coefficient_N = at::empty({N}, like);
  std::vector<double> outcome_term(B), step_term(B);
  const int64_t grain = N == 0 ? 1 : std::max<int64_t>(1, GRAIN_TOKENS * B / N);

  AT_DISPATCH_FLOATING_TYPES(logp_N.scalar_type(), "step_kto", [&] {
    const scalar_t* lp = logp_N.const_data_ptr<scalar_t>();
    const scalar_t* ref = ref_logp_N.const_data_ptr<scalar_t>();
    scalar_t* ratio = r_B.mutable_data_ptr<scalar_t>();
    scalar_t* step_ratio = r_S.mutable_data_ptr<scalar_t>();
    scalar_t* coefficient = coefficient_N.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, B, grain, [&](int64_t begin, int64_t end) {
      std::vector<double> slope;  // of the loss in each step's r
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = first_step[i], stop = first_step[i + 1];
        slope.assign(stop - first, 0.0);
        const double share = mean_over_steps ? inverse(double(labelled[i])) : 1.0;
        double r_i = 0, step_sum = 0;
        for (int64_t h = first; h < stop; ++h) {
          const double r_h = sum_log_ratio(lp, ref, cu_step[h], cu_step[h + 1]);
          r_i += r_h;
          step_ratio[h] = static_cast<scalar_t>(r_h);
          if (labelled[i] == 0 || h > last_labelled[i] || step_label[h] == -1) continue;
          const Term t = value_term(
              r_h, step_label[h] == 1, step_beta, z_step, step_desirable_weight, step_undesirable_weight);
          step_sum += t.loss * share;
          slope[h - first] = step_weight * t.slope * share * per_supervised;
        }
        const Term t = value_term(r_i, label[i], beta, z, desirable_weight, undesirable_weight);
        ratio[i] = static_cast<scalar_t>(r_i);
        outcome_term[i] = t.loss;
        step_term[i] = step_sum;
        for (int64_t h = first; h < stop; ++h) {
          const double c = slope[h - first] + outcome_weight * t.slope * per_completion;
          std::fill(coefficient + cu_step[h], coefficient + cu_step[h + 1], static_cast<scalar_t>(c));
        }
      }
    });
    double outcome = 0, step = 0;
    for (int64_t i = 0; i < B; ++i) {
      outcome += outcome_term[i];
      step += step_term[i];
    }
    outcome *= per_completion;
    step *= per_supervised;
    *loss.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(outcome_weight * outcome + step_weight * step);
    *outcome_loss.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(outcome);
    *step_loss.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(step);
  });
  return {loss, outcome_loss, step_loss, r_B, r_S, coefficient_N};
}

}  // namespace stepkto
