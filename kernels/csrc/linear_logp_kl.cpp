// The forward of linear_logp_kl on the CPU: see torch-ext/stepkto_kernels/linear_logp_kl/README.md. The logits of both
// models for one (tile, block of tokens) lie side by side in a core's cache and leave two log-sum-exps and one KL per
// token.

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "linear_logp.h"

namespace stepkto {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_logp_kl(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& ref_hidden, const at::Tensor& ref_weight,
    const at::Tensor& target, const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& ref_bias,
    double logit_scale, const std::optional<double> softcap, double temperature, int64_t ignore_index) {
  const Matrix h(hidden), w(weight), ref_h(ref_hidden), ref_w(ref_weight);
  const at::Tensor ids = target.contiguous();
  const Head head = head_of(logit_scale, softcap, temperature);
  const std::vector<float> b = as_floats(bias), ref_b = as_floats(ref_bias);
  const TileKernels& tiles = tile_kernels();
  const int64_t N = h.rows, T = (w.rows + TILE - 1) / TILE;
  const auto floats = at::TensorOptions(at::kFloat);
  const at::Tensor logp = at::zeros({N}, floats), ref_logp = at::zeros({N}, floats), kl = at::zeros({N}, floats);
  const at::Tensor lse = at::zeros({N}, floats), ref_lse = at::zeros({N}, floats);
  const at::Tensor target_logit = at::zeros({2, N}, floats);
  const std::vector<int32_t> tokens = scored_tokens(ids, ignore_index);
  const at::Tensor tile_lse = new_tile_lse(T, N, tokens.size());
  const at::Tensor ref_tile_lse = at::empty({T, N}, floats), tile_kl = at::empty({T, N}, floats);

  const int64_t size =
      tokens_of_block(h.depth * h.arithmetic.product_size + ref_h.depth * ref_h.arithmetic.product_size);
  const int64_t blocks = (static_cast<int64_t>(tokens.size()) + size - 1) / size;
  const int64_t ranges = ranges_of_tiles(blocks, T);
  struct Scratch {
    PackedBlock block, ref_block;
    char* copy;
    float *z, *y, *lse, *ref_lse, *kl;
  };
  const auto scratch = [&](Arena& arena) {
    return Scratch{PackedBlock(h, size, arena),
                   PackedBlock(ref_h, size, arena),
                   arena.take<char>(std::max(w.copy_bytes(), ref_w.copy_bytes())),
                   arena.take<float>(TILE * size),
                   arena.take<float>(TILE * size),
                   arena.take<float>(size),
                   arena.take<float>(size),
                   arena.take<float>(size)};
  };
  const int64_t* id = ids.const_data_ptr<int64_t>();
  float* of_tiles = tile_lse.mutable_data_ptr<float>();
  float* ref_of_tiles = ref_tile_lse.mutable_data_ptr<float>();
  float* kl_of_tiles = tile_kl.mutable_data_ptr<float>();
  float* z_target = target_logit.mutable_data_ptr<float>();
  float* y_target = z_target + N;
  for_each_unit(blocks * ranges, scratch, [&](int64_t unit, Scratch& s) {
    const int64_t first = unit / ranges * size, range = unit % ranges;
    const int64_t count = std::min<int64_t>(size, static_cast<int64_t>(tokens.size()) - first);
    s.block.pack(h, tokens.data(), first, count);
    s.ref_block.pack(ref_h, tokens.data(), first, count);
    for (int64_t t = T * range / ranges; t < T * (range + 1) / ranges; ++t) {
      const int64_t rows = std::min(TILE, w.rows - t * TILE);
      tile_logits(w, t, s.block, b, head, s.copy, s.z);
      tile_logits(ref_w, t, s.ref_block, ref_b, head, s.copy, s.y);
      set_targets_apart(s.z, t, rows, s.block, tokens, id, z_target);
      set_targets_apart(s.y, t, rows, s.ref_block, tokens, id, y_target);
      tiles.kl(s.z, s.y, rows, s.block.columns, s.lse, s.ref_lse, s.kl);
      scatter(s.lse, s.block, tokens, of_tiles + t * N);
      scatter(s.ref_lse, s.block, tokens, ref_of_tiles + t * N);
      scatter(s.kl, s.block, tokens, kl_of_tiles + t * N);
    }
  });

  float* logp_N = logp.mutable_data_ptr<float>();
  float* ref_logp_N = ref_logp.mutable_data_ptr<float>();
  float* kl_N = kl.mutable_data_ptr<float>();
  float* lse_N = lse.mutable_data_ptr<float>();
  float* ref_lse_N = ref_lse.mutable_data_ptr<float>();
  for_lanes_of_tokens(N, 16, [&](int64_t n0, int64_t some) {
    float max[LANES], sum[LANES], ref_max[LANES], ref_sum[LANES], mean[LANES];
    tiles.reduce_tiles(of_tiles + n0, T, N, some, max, sum);
    tiles.reduce_tiles(ref_of_tiles + n0, T, N, some, ref_max, ref_sum);
    for (int64_t n = n0; n < n0 + some; ++n) {
      if (id[n] == ignore_index) continue;
      const Outcome policy = outcome(z_target[n], max[n - n0], sum[n - n0]);
      const Outcome reference = outcome(y_target[n], ref_max[n - n0], ref_sum[n - n0]);
      lse_N[n] = static_cast<float>(policy.lse);
      ref_lse_N[n] = static_cast<float>(reference.lse);
      logp_N[n] = static_cast<float>(policy.logp);
      ref_logp_N[n] = static_cast<float>(reference.logp);
    }
    tiles.mean_over_tiles(of_tiles + n0, ref_of_tiles + n0, kl_of_tiles + n0, T, N, some, lse_N + n0, ref_lse_N + n0,
                          mean);
    for (int64_t n = n0; n < n0 + some; ++n) {
      if (id[n] == ignore_index) continue;
      const double l = logp_N[n], ref_l = ref_logp_N[n];
      const float total = static_cast<float>(mean[n - n0] + std::exp(l) * (l - ref_l));
      kl_N[n] = total < 0 ? 0.0f : total;  // rounding; NaN stays NaN
    }
  });
  return {logp, ref_logp, kl, lse, tile_lse};
}

}  // namespace stepkto
