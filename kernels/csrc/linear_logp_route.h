// Which (token, vocabulary tile) pairs a backward visits: see linear_logp_route.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace stepkto {

struct Routing {
  std::vector<int32_t> live;      // tokens that visit anything
  std::vector<int32_t> home;      // (N,) the tile of a live token's target, else -1
  std::vector<float> threshold;   // (N,)
  std::vector<int64_t> visitors;  // (T,) tokens of each tile
  bool dense = true;              // every live token visits every tile
  at::Tensor figures;             // rho, largest and mean share of dropped mass, dense
};

// fp32 contiguous per-token tensors; `entropy` where there is an entropy gradient
Routing route(std::vector<int32_t> live, const at::Tensor& target, const at::Tensor& logp, const at::Tensor& lse,
              const at::Tensor& tile_lse, const std::optional<at::Tensor>& entropy, double filter_eps);

// The tokens that visit a tile, in order, into `tokens`
void list_visitors(const Routing& routing, const at::Tensor& lse, const at::Tensor& tile_lse,
                   const std::optional<at::Tensor>& entropy, int64_t tile, int32_t* tokens);

}  // namespace stepkto
