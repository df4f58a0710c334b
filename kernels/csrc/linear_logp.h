// What the forwards of the head ops share: see linear_logp.cpp.
#pragma once

#include <cmath>
#include <vector>

#include "products.h"

namespace stepkto {

// Tokens whose target is not `ignore_index`, in order.
std::vector<int32_t> scored_tokens(const at::Tensor& target, int64_t ignore_index);

// (T, N), to be filled for the scored tokens; 0 for the others, so that results are always the same.
at::Tensor new_tile_lse(int64_t tiles, int64_t tokens, size_t scored);

// A block of the scored tokens, their hidden states packed as the right operand of every tile's product.
struct PackedBlock {
  char* hidden;
  int64_t first = -1, count = 0, columns = 0;  // tokens rows[first], ..., and their number, also padded

  PackedBlock(const Matrix& matrix, int64_t size, Arena& arena)
      : hidden(arena.take<char>(size * matrix.depth * matrix.arithmetic.product_size)) {}
  void pack(const Matrix& matrix, const int32_t* rows, int64_t from, int64_t many);
};

// The logits of a tile for a block, (rows of the tile, columns); `copy` is scratch.
void tile_logits(const Matrix& weight, int64_t tile, const PackedBlock& block, const std::vector<float>& bias,
                 Head head, char* copy, float* z);

// Takes the targets' logits out of a tile's: into `target_logit`, -inf in their place.
void set_targets_apart(float* z, int64_t tile, int64_t rows, const PackedBlock& block,
                       const std::vector<int32_t>& tokens, const int64_t* target, float* target_logit);

// One number per token of a block to the tile's row of a (T, N) tensor.
void scatter(const float* x, const PackedBlock& block, const std::vector<int32_t>& tokens, float* row);

// Into how many ranges the tiles of each block are cut: so many that threads end together, so few that packing a block
// is paid for by many tiles.
int64_t ranges_of_tiles(int64_t blocks, int64_t tiles);

// logsumexp and log-probability of the target from its logit and the others' maximum and sum of exp(z - maximum)
struct Outcome {
  double lse, logp;
};
inline Outcome outcome(double target_logit, double max, double sum) {
  if (sum == 0) return {target_logit, 0.0};
  const double rest = max + std::log(sum), above = rest - target_logit;
  if (above > 40) return {rest + std::exp(-above), -above - std::exp(-above)};  // of a logit of -inf, too
  const double logp = -std::log1p(std::exp(above));
  return {target_logit - logp, logp};
}

}  // namespace stepkto
