// The vector arithmetic of the head kernels on a block of logits, once per instruction set: tiles.cpp is compiled for
// each and tile_kernels() picks at run time. A block is (rows, columns) fp32, row-major and contiguous: rows are
// entries of one vocabulary tile, columns are tokens. So every reduction over the vocabulary runs down the rows, with a
// token in each lane.
#pragma once

#include <cstdint>

namespace stepkto {

constexpr int64_t TILE = 128;    // vocabulary entries of a tile: VOCAB_TILE of linear_logp/eager.py
constexpr int64_t LANES = 16;    // a block's columns are padded to a multiple of it
constexpr int64_t BLOCK = 256;   // columns of a block, at most

// From hidden @ weight.T + bias to logits: slope * x, or with a softcap cap_out * tanh(cap_in * x).
struct Head {
  float slope, cap_in, cap_out;
  bool capped;
};

// Results per token of reducing its tiles.
struct Routes {
  float* threshold;  // tiles that score less are left out
  float* dropped;    // what those weigh, as a share of 1 - p_target
  int32_t* kept;     // how many are not left out
};

struct TileKernels {
  const char* name;  // of the instruction set
  // accumulated products to logits, in place; bias (rows,) or null
  void (*logits)(float* z, int64_t rows, int64_t columns, const float* bias, Head head);
  // lse (columns,); entropy (columns,) of the softmax within the block, or null
  void (*log_sum_exp)(const float* z, int64_t rows, int64_t columns, float* lse, float* entropy);
  // with the softmax q within the block: sum of q^2 (0 of no mass), and the largest logit; sums of a block's columns
  void (*collisions)(const float* z, int64_t rows, int64_t columns, const float* lse, float* sum_sq, float* largest);
  void (*sums)(const float* z, int64_t rows, int64_t columns, float* sum);
  // both log-sum-exps, and the KL between the two softmaxes within the block
  void (*kl)(const float* z, const float* y, int64_t rows, int64_t columns, float* lse, float* ref_lse, float* kl);
  // logits to slope * dL/dlogit (of the non-targets), in place: -g p - g_H p (log p + H); g_H and H may be null
  void (*gradients)(float* z, int64_t rows, int64_t columns, const float* lse, const float* grad_logp,
                    const float* grad_entropy, const float* entropy, Head head);
  // (T, count) tile log-sum-exps, `stride` apart: their maximum and the sum of exp(x - maximum)
  void (*reduce_tiles)(const float* tile_lse, int64_t T, int64_t stride, int64_t count, float* max, float* sum);
  // sum over tiles of P * (within - log P), respectively P * (within + log P - log Q) with ref_tile_lse
  void (*mean_over_tiles)(const float* tile_lse, const float* ref_tile_lse, const float* within, int64_t T,
                          int64_t stride, int64_t count, const float* lse, const float* ref_lse, float* mean);
  // sum over tiles of P^2 * within
  void (*collisions_over_tiles)(const float* tile_lse, const float* within, int64_t T, int64_t stride, int64_t count,
                                const float* lse, float* sum_sq);
  // for `count` <= LANES tokens: the tiles that can be left out; scratch holds 2 * T * LANES numbers
  void (*thresholds)(const float* tile_lse, int64_t T, int64_t stride, int64_t count, const float* lse,
                     const float* entropy, const float* logp, const int32_t* home, float filter_eps, float* scratch,
                     Routes out);
  // tokens that visit tile t, in order; returns their number, `out` may be null
  int64_t (*visitors)(const float* tile_lse, const float* lse, const float* entropy, const float* threshold,
                      const int32_t* home, int64_t t, int64_t N, int32_t* out);
  // sums[rows[i]] += x[i], rows of `columns` numbers
  void (*add_rows)(const float* x, const int32_t* rows, int64_t first_row, int64_t count, int64_t columns, float* sums);
};

const TileKernels& tile_kernels();

}  // namespace stepkto
