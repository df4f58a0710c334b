// Routing of the backward of linear_logp on the CPU; the criterion is derived in
// torch-ext/stepkto_kernels/linear_logp/README.md. A token leaves out its lightest tiles, up to filter_eps of its
// non-target mass; each tile then knows its tokens from their thresholds, and no list of all pairs is kept.

#include "linear_logp_route.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>

#include "products.h"

namespace stepkto {
namespace {

constexpr double DENSE_RHO = 0.9;  // above this share of pairs, leaving out the rest saves less than its error is worth

const float* data(const std::optional<at::Tensor>& x) { return x ? x->const_data_ptr<float>() : nullptr; }

}  // namespace

void list_visitors(const Routing& routing, const at::Tensor& lse, const at::Tensor& tile_lse,
                   const std::optional<at::Tensor>& entropy, int64_t tile, int32_t* tokens) {
  if (routing.dense) {
    std::copy(routing.live.begin(), routing.live.end(), tokens);
    return;
  }
  const int64_t N = tile_lse.size(1);
  tile_kernels().visitors(tile_lse.const_data_ptr<float>() + tile * N, lse.const_data_ptr<float>(), data(entropy),
                          routing.threshold.data(), routing.home.data(), tile, N, tokens);
}

Routing route(std::vector<int32_t> live, const at::Tensor& target, const at::Tensor& logp, const at::Tensor& lse,
              const at::Tensor& tile_lse, const std::optional<at::Tensor>& entropy, double filter_eps) {
  const TileKernels& tiles = tile_kernels();
  const int64_t N = tile_lse.size(1), T = tile_lse.size(0);
  const int64_t* id = target.const_data_ptr<int64_t>();
  Routing r;
  r.live = std::move(live);
  const int64_t everything = static_cast<int64_t>(r.live.size()) * T;
  r.visitors.assign(T, r.live.size());
  r.home.assign(N, -1);
  for (const int32_t n : r.live) r.home[n] = static_cast<int32_t>(id[n] / TILE);
  std::vector<float> dropped(N, 0.0f);
  int64_t pairs = everything;
  if (filter_eps > 0) {
    r.threshold.assign(N, -std::numeric_limits<float>::infinity());
    std::vector<int32_t> kept(N, 0);
    const float* masses = tile_lse.const_data_ptr<float>();
    const float* lse_N = lse.const_data_ptr<float>();
    const float* logp_N = logp.const_data_ptr<float>();
    const float* H = data(entropy);
    const auto scratch = [&](Arena& arena) { return arena.take<float>(2 * T * LANES); };
    for_each_unit((N + LANES - 1) / LANES, scratch, [&](int64_t unit, float* s) {
      const int64_t n = unit * LANES;
      tiles.thresholds(masses + n, T, N, std::min(LANES, N - n), lse_N + n, H ? H + n : nullptr, logp_N + n,
                       r.home.data() + n, static_cast<float>(filter_eps), s,
                       {r.threshold.data() + n, dropped.data() + n, kept.data() + n});
    });
    pairs = 0;
    for (const int32_t n : r.live) pairs += kept[n];
    r.dense = static_cast<double>(pairs) > DENSE_RHO * static_cast<double>(everything);
    if (r.dense) {
      pairs = everything;
    } else {
      at::parallel_for(0, T, 4, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          r.visitors[t] = tiles.visitors(masses + t * N, lse_N, H, r.threshold.data(), r.home.data(), t, N,
                                         nullptr);
        }
      });
    }
  }
  double most = 0, sum = 0;
  for (const int32_t n : r.live) {
    if (r.dense) break;
    most = std::max<double>(most, dropped[n]);
    sum += dropped[n];
  }
  const double tokens = std::max<double>(1, static_cast<double>(r.live.size()));
  r.figures = at::empty({4}, at::TensorOptions(at::kFloat));
  float* figures = r.figures.mutable_data_ptr<float>();
  figures[0] = static_cast<float>(static_cast<double>(pairs) / std::max<double>(1, static_cast<double>(everything)));
  figures[1] = static_cast<float>(most);
  figures[2] = static_cast<float>(sum / tokens);
  figures[3] = r.dense;
  return r;
}

}  // namespace stepkto
