// The forward of linear_logp, linear_logp_entropy and linear_logp_stats on the CPU: see the READMEs of linear_logp and
// linear_logp_stats in torch-ext/stepkto_kernels.
//
// Logits exist a block at a time, (128 entries of the vocabulary, up to 256 tokens) in fp32, in a core's cache: a
// product writes it, its epilogue leaves one log-sum-exp per token. The tokens' hidden states are packed once per block
// and are the right operand; the tile of W is the left one and is read where it lies.

#include "linear_logp.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>
#include <tuple>

namespace stepkto {
namespace {

// Of a sum over D, in bytes of an operand's row: products of such parts are added up, so that rounding grows with the
// length of a part and not of the whole. Five times more exact at 1024 entries, and no slower.
constexpr int64_t DEPTH_BYTES = 512;

// Of each (tile, token): the sum of its logits, the sum of the squares of the softmax within it, and the largest logit
// but the target's. In the target's own tile infinity takes the place of that where the target is not the first of
// several largest.
struct TileStats {
  at::Tensor sum, sum_sq, rival;

  TileStats(int64_t tiles, int64_t tokens)
      : sum(at::empty({tiles, tokens}, at::kFloat)), sum_sq(at::empty_like(sum)), rival(at::empty_like(sum)) {}
};

// Where an entry before the target's has its logit or a larger one
void rule_out_later(const float* z, int64_t tile, int64_t rows, const PackedBlock& block,
                    const std::vector<int32_t>& tokens, const int64_t* target, const float* target_logit,
                    float* rival) {
  for (int64_t j = 0; j < block.count; ++j) {
    const int64_t token = tokens[block.first + j], v = target[token] - tile * TILE;
    if (v < 0 || v >= rows) continue;
    for (int64_t u = 0; u < v; ++u) {
      if (z[u * block.columns + j] >= target_logit[token]) rival[j] = std::numeric_limits<float>::infinity();
    }
  }
}

// log sum p^2, the mean logit, and whether the target comes first
void reduce_stats(const TileStats& of_tiles, const TileKernels& tiles, const float* tile_lse, int64_t tokens,
                  const int64_t* target, int64_t ignore_index, int64_t vocabulary, const float* target_logit,
                  const float* lse, const float* logp, float* stats) {
  const int64_t T = of_tiles.sum.size(0);
  const float* sum = of_tiles.sum.const_data_ptr<float>();
  const float* sum_sq = of_tiles.sum_sq.const_data_ptr<float>();
  const float* rival = of_tiles.rival.const_data_ptr<float>();
  for_lanes_of_tokens(tokens, 16, [&](int64_t n0, int64_t some) {
    float squares[LANES];
    double total[LANES] = {};
    bool first[LANES];
    tiles.collisions_over_tiles(tile_lse + n0, sum_sq + n0, T, tokens, some, lse + n0, squares);
    std::fill_n(first, some, true);
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t k = 0; k < some; ++k) {
        const float z = target_logit[n0 + k], other = rival[t * tokens + n0 + k];
        total[k] += sum[t * tokens + n0 + k];
        first[k] = first[k] && (t < target[n0 + k] / TILE ? other < z : other <= z);
      }
    }
    for (int64_t k = 0; k < some; ++k) {
      const int64_t n = n0 + k;
      if (target[n] == ignore_index) continue;
      stats[n] = static_cast<float>(std::log(std::exp(2.0 * logp[n]) + squares[k]));
      stats[tokens + n] = static_cast<float>(total[k] / vocabulary);
      stats[2 * tokens + n] = first[k];
    }
  });
}

}  // namespace

std::vector<int32_t> scored_tokens(const at::Tensor& target, int64_t ignore_index) {
  const int64_t* id = target.const_data_ptr<int64_t>();
  std::vector<int32_t> tokens;
  tokens.reserve(target.numel());
  for (int64_t n = 0; n < target.numel(); ++n) {
    if (id[n] != ignore_index) tokens.push_back(static_cast<int32_t>(n));
  }
  return tokens;
}

at::Tensor new_tile_lse(int64_t tiles, int64_t tokens, size_t scored) {
  const auto floats = at::TensorOptions(at::kFloat);
  const bool all = scored == static_cast<size_t>(tokens);
  return all ? at::empty({tiles, tokens}, floats) : at::zeros({tiles, tokens}, floats);
}

void PackedBlock::pack(const Matrix& matrix, const int32_t* rows, int64_t from, int64_t many) {
  first = from;
  count = many;
  columns = padded(many, LANES);
  matrix.arithmetic.pack->pack_columns(matrix.row(0), matrix.stride, rows + from, many, columns, matrix.D, hidden);
}

void tile_logits(const Matrix& weight, int64_t tile, const PackedBlock& block, const std::vector<float>& bias,
                 Head head, char* copy, float* z) {
  const int64_t first = tile * TILE, rows = std::min(TILE, weight.rows - first);
  int64_t stride;
  const void* w = weight.left(first, rows, copy, stride);
  const int64_t size = weight.arithmetic.product_size, part = DEPTH_BYTES / size;
  for (int64_t k = 0; k < std::max<int64_t>(weight.depth, 1); k += part) {
    weight.arithmetic.multiply(rows, block.columns, std::min(part, weight.depth - k),
                               static_cast<const char*>(w) + k * size, stride,
                               block.hidden + k * block.columns * size, block.columns, z, block.columns, k > 0);
  }
  if (bias.empty() && !head.capped && head.slope == 1.0f) return;
  tile_kernels().logits(z, rows, block.columns, bias.empty() ? nullptr : bias.data() + first, head);
}

void set_targets_apart(float* z, int64_t tile, int64_t rows, const PackedBlock& block,
                       const std::vector<int32_t>& tokens, const int64_t* target, float* target_logit) {
  for (int64_t j = 0; j < block.count; ++j) {
    const int64_t token = tokens[block.first + j], v = target[token] - tile * TILE;
    if (v < 0 || v >= rows) continue;
    target_logit[token] = z[v * block.columns + j];
    z[v * block.columns + j] = -std::numeric_limits<float>::infinity();
  }
}

void scatter(const float* x, const PackedBlock& block, const std::vector<int32_t>& tokens, float* row) {
  for (int64_t j = 0; j < block.count; ++j) row[tokens[block.first + j]] = x[j];
}

int64_t ranges_of_tiles(int64_t blocks, int64_t tiles) {
  const int64_t units = 4 * at::get_num_threads();
  return std::clamp<int64_t>((units + blocks - 1) / std::max<int64_t>(blocks, 1), 1, tiles);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_logp(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& target, const std::optional<at::Tensor>& bias,
    double logit_scale, const std::optional<double> softcap, double temperature, int64_t ignore_index,
    bool with_entropy, bool with_stats) {
  const Matrix h(hidden), w(weight);
  const at::Tensor ids = target.contiguous();
  const Head head = head_of(logit_scale, softcap, temperature);
  const std::vector<float> b = as_floats(bias);
  const TileKernels& tiles = tile_kernels();
  const int64_t N = h.rows, T = (w.rows + TILE - 1) / TILE;
  const auto floats = at::TensorOptions(at::kFloat);
  const at::Tensor logp = at::zeros({N}, floats), lse = at::zeros({N}, floats);
  const std::vector<int32_t> tokens = scored_tokens(ids, ignore_index);
  const at::Tensor tile_lse = new_tile_lse(T, N, tokens.size());
  // a target that is no entry of this head (of a shard, then) has probability 0 here
  const at::Tensor target_logit = at::full({N}, -std::numeric_limits<float>::infinity(), floats);
  const at::Tensor entropy = at::zeros({with_entropy ? N : 0}, floats);
  const at::Tensor tile_entropy = at::empty({with_entropy ? T : 0, N}, floats);
  const at::Tensor stats = at::zeros({3, with_stats ? N : 0}, floats);
  const TileStats of_tiles(with_stats ? T : 0, N);

  const int64_t size = tokens_of_block(h.depth * h.arithmetic.product_size);
  const int64_t blocks = (static_cast<int64_t>(tokens.size()) + size - 1) / size;
  const int64_t ranges = ranges_of_tiles(blocks, T);
  struct Scratch {
    PackedBlock block;
    char* copy;
    float *z, *lse, *entropy, *stat;
  };
  const auto scratch = [&](Arena& arena) {
    return Scratch{PackedBlock(h, size, arena), arena.take<char>(w.copy_bytes()), arena.take<float>(TILE * size),
                   arena.take<float>(size), arena.take<float>(with_entropy ? size : 0),
                   arena.take<float>(with_stats ? 2 * size : 0)};
  };
  const int64_t* id = ids.const_data_ptr<int64_t>();
  float* out = tile_lse.mutable_data_ptr<float>();
  float* out_entropy = tile_entropy.mutable_data_ptr<float>();
  float* z_target = target_logit.mutable_data_ptr<float>();
  float* out_sum = of_tiles.sum.mutable_data_ptr<float>();
  float* out_sum_sq = of_tiles.sum_sq.mutable_data_ptr<float>();
  float* out_rival = of_tiles.rival.mutable_data_ptr<float>();
  for_each_unit(blocks * ranges, scratch, [&](int64_t unit, Scratch& s) {
    const int64_t first = unit / ranges * size, range = unit % ranges;
    s.block.pack(h, tokens.data(), first, std::min<int64_t>(size, static_cast<int64_t>(tokens.size()) - first));
    for (int64_t t = T * range / ranges; t < T * (range + 1) / ranges; ++t) {
      const int64_t rows = std::min(TILE, w.rows - t * TILE);
      tile_logits(w, t, s.block, b, head, s.copy, s.z);
      if (with_stats) {
        tiles.sums(s.z, rows, s.block.columns, s.stat);
        scatter(s.stat, s.block, tokens, out_sum + t * N);
      }
      set_targets_apart(s.z, t, rows, s.block, tokens, id, z_target);
      tiles.log_sum_exp(s.z, rows, s.block.columns, s.lse, with_entropy ? s.entropy : nullptr);
      scatter(s.lse, s.block, tokens, out + t * N);
      if (with_entropy) scatter(s.entropy, s.block, tokens, out_entropy + t * N);
      if (!with_stats) continue;
      float* rival = s.stat + size;
      tiles.collisions(s.z, rows, s.block.columns, s.lse, s.stat, rival);
      rule_out_later(s.z, t, rows, s.block, tokens, id, z_target, rival);
      scatter(s.stat, s.block, tokens, out_sum_sq + t * N);
      scatter(rival, s.block, tokens, out_rival + t * N);
    }
  });

  float* logp_N = logp.mutable_data_ptr<float>();
  float* lse_N = lse.mutable_data_ptr<float>();
  float* entropy_N = entropy.mutable_data_ptr<float>();
  for_lanes_of_tokens(N, 16, [&](int64_t n0, int64_t some) {
    float max[LANES], sum[LANES], of_tiles_entropy[LANES];
    tiles.reduce_tiles(out + n0, T, N, some, max, sum);
    for (int64_t n = n0; n < n0 + some; ++n) {
      if (id[n] == ignore_index) continue;
      const Outcome o = outcome(z_target[n], max[n - n0], sum[n - n0]);
      lse_N[n] = static_cast<float>(o.lse);
      logp_N[n] = static_cast<float>(o.logp);
    }
    if (!with_entropy) return;
    tiles.mean_over_tiles(out + n0, nullptr, out_entropy + n0, T, N, some, lse_N + n0, nullptr,
                          of_tiles_entropy);
    for (int64_t n = n0; n < n0 + some; ++n) {
      if (id[n] == ignore_index) continue;
      const double l = logp_N[n], of_target = std::isinf(l) ? 0.0 : std::exp(l) * l;
      entropy_N[n] = static_cast<float>(of_tiles_entropy[n - n0] - of_target);
    }
  });
  if (with_stats) {
    reduce_stats(of_tiles, tiles, out, N, id, ignore_index, w.rows, z_target, lse_N, logp_N,
                 stats.mutable_data_ptr<float>());
  }
  return {logp, lse, tile_lse, entropy, stats};
}

}  // namespace stepkto
