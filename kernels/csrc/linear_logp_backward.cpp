// The backward of linear_logp and linear_logp_entropy on the CPU: see torch-ext/stepkto_kernels/linear_logp/README.md.
//
// Chunk by chunk of the vocabulary's tiles, three passes over the pairs (token, tile) that the routing kept:
//   gradients  the logits again, dL/dz from them into a workspace, as it is (entry, token) and transposed
//   weight     dW of a tile's columns, from its tokens: complete, written once
//   hidden     dhidden of a range of tokens' columns, from the chunk's tiles: carried from chunk to chunk
// Each unit of a pass owns what it writes and sums in a fixed order, so results are bitwise the same for any number of
// threads.

#include <ATen/ops/empty.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <tuple>

#include "linear_logp.h"
#include "linear_logp_route.h"

namespace stepkto {
namespace {

constexpr int64_t WEIGHT_SLICE = 256;  // columns of dW that a unit owns
constexpr int64_t SLICE = 128;         // columns of dhidden that a unit owns
constexpr int64_t RANGE = 1024;        // tokens of them
constexpr int64_t GROUP = 4;           // tiles that share a packed block where all have the same tokens
// The workspace's share of the logits, had they the operands' type. Every chunk reads and writes all sums of dhidden,
// and where all pairs are visited that is the larger part of what chunks cost.
constexpr int64_t ROUTED_SHARE = 128, DENSE_SHARE = 40;

// Asks for huge pages: a gradient of a head is fresh memory each time, and writing it costs as much as mapping it.
void map_coarsely(const at::Tensor& x) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t SIZE = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  const uintptr_t first = (begin + SIZE - 1) & ~(SIZE - 1), last = (begin + x.nbytes()) & ~(SIZE - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: failing is fine
#else
  (void)x;
#endif
}

class Backward {
 public:
  Backward(const at::Tensor& grad_logp, const std::optional<at::Tensor>& grad_entropy, const at::Tensor& hidden,
           const at::Tensor& weight, const at::Tensor& target, const at::Tensor& logp, const at::Tensor& lse,
           const at::Tensor& tile_lse, const std::optional<at::Tensor>& entropy, const std::optional<at::Tensor>& bias,
           Head head)
      : h_(hidden), w_(weight), target_(target), logp_(logp), lse_(lse), tile_lse_(tile_lse), entropy_(entropy),
        grad_logp_(grad_logp), grad_entropy_(grad_entropy), bias_(as_floats(bias)), head_(head),
        T_((w_.rows + TILE - 1) / TILE), size_(tokens_of_block(h_.depth * h_.arithmetic.product_size)) {}

  at::Tensor run(int64_t ignore_index, double filter_eps, int64_t workspace_bytes, at::Tensor dhidden,
                 at::Tensor dweight, at::Tensor dbias) {
    dhidden_ = dhidden;
    dweight_ = dweight;
    dbias_ = dbias;
    if (dweight.defined()) map_coarsely(dweight);
    routing_ = route(live_tokens(ignore_index), target_, logp_, lse_, tile_lse_, entropy_, filter_eps);
    const int64_t rest_size = h_.arithmetic.pack->rest_size;
    if (dhidden.defined()) rest_ = at::empty({h_.rows * h_.D * rest_size}, at::TensorOptions(at::kByte));
    const int64_t row_bytes = 2 * TILE * h_.arithmetic.product_size;
    const int64_t logits = h_.rows * w_.rows * h_.arithmetic.product_size;
    const int64_t share = logits / (routing_.dense ? DENSE_SHARE : ROUTED_SHARE);
    const int64_t some_rows = padded(std::max<int64_t>(std::min(workspace_bytes, share) / row_bytes, LANES), LANES);
    int64_t rows = 0;
    std::vector<Chunk> chunks;
    for (int64_t t = 0; t < T_; ++t) {
      const int64_t more = padded(routing_.visitors[t], LANES);
      if (chunks.empty() || chunks.back().offset.back() + more > some_rows) chunks.push_back({t, {0}});
      chunks.back().offset.push_back(chunks.back().offset.back() + more);
      rows = std::max(rows, chunks.back().offset.back());
    }
    rows += LANES;  // a product of 16 rows at a time may begin at any row
    const auto bytes = at::TensorOptions(at::kByte);
    tokens_ = at::empty({rows}, at::TensorOptions(at::kInt));
    gradients_ = at::empty({dweight.defined() || dbias.defined() ? rows * row_bytes / 2 : 0}, bytes);
    transposed_ = at::empty({dhidden.defined() ? rows * row_bytes / 2 : 0}, bytes);
    for (const Chunk& chunk : chunks) {
      find_gradients(chunk);
      if (dweight.defined() || dbias.defined()) multiply_weight(chunk);
      if (dhidden.defined()) multiply_hidden(chunk, chunk.first_tile == 0);
    }
    if (rest_size > 0 && dhidden.defined()) {
      at::parallel_for(0, h_.rows, 64, [&](int64_t begin, int64_t end) {
        h_.arithmetic.pack->finish_sums(dhidden_.mutable_data_ptr(), rest_.const_data_ptr(), begin * h_.D,
                                        (end - begin) * h_.D);
      });
    }
    return routing_.figures;
  }

 private:
  // Consecutive tiles; offset[i] is where the rows of tile first_tile + i begin in the workspace, offset.back() the end
  struct Chunk {
    int64_t first_tile;
    std::vector<int64_t> offset;
    int64_t tiles() const { return static_cast<int64_t>(offset.size()) - 1; }
  };

  std::vector<int32_t> live_tokens(int64_t ignore_index) const {
    const int64_t* id = target_.const_data_ptr<int64_t>();
    const float* g = grad_logp_.const_data_ptr<float>();
    const float* g_H = grad_entropy_ ? grad_entropy_->const_data_ptr<float>() : nullptr;
    std::vector<int32_t> live;
    for (int64_t n = 0; n < h_.rows; ++n) {
      if (id[n] != ignore_index && (g[n] != 0 || (g_H && g_H[n] != 0))) live.push_back(static_cast<int32_t>(n));
    }
    return live;
  }

  int64_t rows_of_tile(int64_t tile) const { return std::min(TILE, w_.rows - tile * TILE); }
  int64_t visitors(const Chunk& chunk, int64_t i) const { return routing_.visitors[chunk.first_tile + i]; }
  int32_t* tokens(const Chunk& chunk, int64_t i) const {
    return tokens_.mutable_data_ptr<int32_t>() + chunk.offset[i];
  }
  char* workspace(const at::Tensor& x, int64_t row) const {
    return x.numel() == 0 ? nullptr
                          : static_cast<char*>(x.mutable_data_ptr()) + row * TILE * h_.arithmetic.product_size;
  }

  struct BlockOfTile {
    int64_t tile, first;  // in the chunk; among the tile's tokens
  };

  void find_gradients(const Chunk& chunk) {
    at::parallel_for(0, chunk.tiles(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        list_visitors(routing_, lse_, tile_lse_, entropy_, chunk.first_tile + i, tokens(chunk, i));
      }
    });
    std::vector<BlockOfTile> blocks;
    if (routing_.dense) {  // neighbours share their tokens
      for (int64_t first = 0; first < visitors(chunk, 0); first += size_) {
        for (int64_t i = 0; i < chunk.tiles(); ++i) blocks.push_back({i, first});
      }
    } else {
      for (int64_t i = 0; i < chunk.tiles(); ++i) {
        for (int64_t first = 0; first < visitors(chunk, i); first += size_) blocks.push_back({i, first});
      }
    }
    struct Scratch {
      PackedBlock block;
      char* copy;
      float* z;
      float lse[BLOCK], g[BLOCK], g_H[BLOCK], H[BLOCK];
    };
    const auto scratch = [&](Arena& arena) {
      return Scratch{PackedBlock(h_, size_, arena), arena.take<char>(w_.copy_bytes()),
                     arena.take<float>(TILE * size_), {}, {}, {}, {}};
    };
    const int64_t together = routing_.dense ? std::min(GROUP, chunk.tiles()) : 1;
    const int64_t units = (static_cast<int64_t>(blocks.size()) + together - 1) / together;
    for_each_unit(units, scratch, [&](int64_t unit, Scratch& s) {
      const int64_t stop = std::min<int64_t>((unit + 1) * together, blocks.size());
      for (int64_t k = unit * together; k < stop; ++k) gradients_of_block(chunk, blocks[k], s);
    });
  }

  template <typename Scratch>
  void gradients_of_block(const Chunk& chunk, BlockOfTile at, Scratch& s) {
    const int64_t tile = chunk.first_tile + at.tile, rows = rows_of_tile(tile);
    const int32_t* token = tokens(chunk, at.tile) + at.first;
    const int64_t count = std::min(size_, visitors(chunk, at.tile) - at.first);
    if (!routing_.dense || s.block.first != at.first) {
      s.block.pack(h_, tokens(chunk, at.tile), at.first, count);
      const float* lse = lse_.const_data_ptr<float>();
      for (int64_t j = 0; j < s.block.columns; ++j) {  // padding: packed as zeros, probabilities of 0
        const bool real = j < count;
        s.lse[j] = real ? lse[token[j]] : 1e30f;
        s.g[j] = real ? grad_logp_.const_data_ptr<float>()[token[j]] * head_.slope : 0.0f;
        if (!grad_entropy_) continue;
        s.g_H[j] = real ? grad_entropy_->const_data_ptr<float>()[token[j]] * head_.slope : 0.0f;
        s.H[j] = real ? entropy_->const_data_ptr<float>()[token[j]] : 0.0f;
      }
    }
    float* z = s.z;
    const int64_t columns = s.block.columns;
    tile_logits(w_, tile, s.block, bias_, head_, s.copy, z);
    const int64_t* id = target_.const_data_ptr<int64_t>();
    float of_target[BLOCK];
    for (int64_t j = 0; j < count; ++j) {
      const int64_t v = id[token[j]] - tile * TILE;
      if (v < 0 || v >= rows) continue;
      const float tanh = head_.capped ? z[v * columns + j] / head_.cap_out : 0.0f;
      of_target[j] = target_gradient(token[j], s.g[j], s.g_H[j], s.H[j]) * (1.0f - tanh * tanh);
    }
    const bool with_entropy = grad_entropy_.has_value();
    tile_kernels().gradients(z, rows, columns, s.lse, s.g, with_entropy ? s.g_H : nullptr,
                             with_entropy ? s.H : nullptr, head_);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t v = id[token[j]] - tile * TILE;
      if (v >= 0 && v < rows) z[v * columns + j] = of_target[j];
    }
    const int64_t row = chunk.offset[at.tile] + at.first;
    h_.arithmetic.pack->store_gradients(z, rows, columns, workspace(gradients_, row), workspace(transposed_, row));
  }

  // g (1 - p) - g_H p (log p + H), to the last digit for p near 1
  float target_gradient(int32_t token, float g, float g_H, float H) const {
    const float l = logp_.const_data_ptr<float>()[token];
    const float slope = -g * std::expm1(l);
    return grad_entropy_ ? slope - g_H * std::exp(l) * (std::max(l, -1e30f) + H) : slope;  // 0 of a p of 0
  }

  void multiply_weight(const Chunk& chunk) {
    const int64_t together = routing_.dense ? std::min(GROUP, chunk.tiles()) : 1;
    const int64_t groups = (chunk.tiles() + together - 1) / together;
    const int64_t slices = dweight_.defined() ? (h_.D + WEIGHT_SLICE - 1) / WEIGHT_SLICE : 0;
    struct Scratch {
      char* operand;
      float* sums;
    };
    const auto scratch = [&](Arena& arena) {
      return Scratch{arena.take<char>(size_ * WEIGHT_SLICE * h_.arithmetic.product_size),
                     arena.take<float>(together * TILE * WEIGHT_SLICE)};
    };
    for_each_unit(groups * slices, scratch, [&](int64_t unit, Scratch& s) {
      const int64_t group = unit / slices, column = unit % slices * WEIGHT_SLICE;
      const int64_t columns = std::min(WEIGHT_SLICE, h_.D - column);
      const int64_t first = group * together, stop = std::min(first + together, chunk.tiles());
      const int32_t* token = tokens(chunk, first);
      for (int64_t j = 0; j < visitors(chunk, first); j += size_) {
        const int64_t count = std::min(size_, visitors(chunk, first) - j), depth = padded(count, LANES);
        int64_t stride;
        const void* b = right_operand(h_, token + j, count, depth, column, columns, s.operand, stride);
        for (int64_t i = first; i < stop; ++i) {
          h_.arithmetic.multiply(rows_of_tile(chunk.first_tile + i), columns, depth,
                                 workspace(gradients_, chunk.offset[i] + j), depth, b, stride,
                                 s.sums + (i - first) * TILE * WEIGHT_SLICE, WEIGHT_SLICE, j > 0);
        }
      }
      for (int64_t i = first; i < stop; ++i) {
        const int64_t row = (chunk.first_tile + i) * TILE;
        float* sums = s.sums + (i - first) * TILE * WEIGHT_SLICE;
        if (visitors(chunk, i) == 0) std::fill_n(sums, TILE * WEIGHT_SLICE, 0.0f);
        char* out = static_cast<char*>(dweight_.mutable_data_ptr()) + (row * h_.D + column) * h_.arithmetic.input_size;
        h_.arithmetic.pack->store(sums, WEIGHT_SLICE, rows_of_tile(chunk.first_tile + i), columns, out, h_.D);
      }
    });
    if (!dbias_.defined()) return;
    at::parallel_for(0, chunk.tiles(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t tile = chunk.first_tile + i, rows = rows_of_tile(tile);
        float sums[TILE] = {};
        for (int64_t j = 0; j < visitors(chunk, i); j += size_) {
          const int64_t columns = padded(std::min(size_, visitors(chunk, i) - j), LANES);
          h_.arithmetic.pack->add_row_sums(workspace(gradients_, chunk.offset[i] + j), rows, columns, sums);
        }
        char* out = static_cast<char*>(dbias_.mutable_data_ptr()) + tile * TILE * h_.arithmetic.input_size;
        h_.arithmetic.pack->store(sums, TILE, 1, rows, out, TILE);
      }
    });
  }

  // The `count` listed rows of `matrix` as a right operand (depth, columns): themselves where they follow each other
  static const void* right_operand(const Matrix& matrix, const int32_t* token, int64_t count, int64_t depth,
                                   int64_t column, int64_t columns, char* copy, int64_t& stride) {
    const bool run = token[count - 1] - token[0] == count - 1;
    if (run && depth == count && !matrix.arithmetic.as_bf16 && !matrix.copies()) {
      stride = matrix.stride;
      return static_cast<const float*>(matrix.row(token[0])) + column;
    }
    stride = columns;
    matrix.arithmetic.pack->pack_rows(matrix.row(0), matrix.stride, token, count, depth, column, columns, copy);
    return copy;
  }

  void multiply_hidden(const Chunk& chunk, bool is_first) {
    const int64_t ranges = (h_.rows + RANGE - 1) / RANGE, slices = (h_.D + SLICE - 1) / SLICE;
    struct Scratch {
      char* operand;
      float *product, *sums;
    };
    const auto scratch = [&](Arena& arena) {
      return Scratch{arena.take<char>(TILE * SLICE * h_.arithmetic.product_size), arena.take<float>(BLOCK * SLICE),
                     arena.take<float>(std::min(RANGE, h_.rows) * SLICE)};
    };
    for_each_unit(ranges * slices, scratch, [&](int64_t unit, Scratch& s) {
      const int64_t first = unit / slices * RANGE, stop = std::min(first + RANGE, h_.rows);
      const int64_t column = unit % slices * SLICE, columns = std::min(SLICE, h_.D - column);
      const OperandKernels& pack = *h_.arithmetic.pack;
      for (int64_t n = first; n < stop; ++n) {
        float* sums = s.sums + (n - first) * columns;
        if (is_first) {
          std::fill_n(sums, columns, 0.0f);
        } else {
          pack.load_sums(dhidden_.const_data_ptr(), rest_.const_data_ptr(), n * h_.D + column, columns, sums);
        }
      }
      for (int64_t i = 0; i < chunk.tiles(); ++i) add_tile(chunk, i, first, stop, column, columns, s);
      for (int64_t n = first; n < stop; ++n) {
        pack.store_sums(s.sums + (n - first) * columns, n * h_.D + column, columns, dhidden_.mutable_data_ptr(),
                        rest_.mutable_data_ptr());
      }
    });
  }

  // sums of tokens [first, stop) += their gradients in a tile @ its rows of W
  template <typename Scratch>
  void add_tile(const Chunk& chunk, int64_t i, int64_t first, int64_t stop, int64_t column, int64_t columns,
                Scratch& s) {
    const int32_t* token = tokens(chunk, i);
    const int32_t* end = token + visitors(chunk, i);
    const int32_t* from = std::lower_bound(token, end, static_cast<int32_t>(first));
    const int32_t* to = std::lower_bound(from, end, static_cast<int32_t>(stop));
    if (from == to) return;
    const int64_t tile = chunk.first_tile + i, rows = rows_of_tile(tile), depth = h_.arithmetic.depth(rows);
    int64_t stride = w_.stride;
    const void* b;
    if (!w_.arithmetic.as_bf16 && !w_.copies()) {
      b = static_cast<const float*>(w_.row(tile * TILE)) + column;
    } else {
      stride = columns;
      w_.arithmetic.pack->pack_rows(w_.row(tile * TILE), w_.stride, nullptr, rows, depth, column, columns, s.operand);
      b = s.operand;
    }
    for (; from < to; from += BLOCK) {
      const int64_t count = std::min<int64_t>(BLOCK, to - from);
      const char* a = workspace(transposed_, chunk.offset[i] + (from - token));
      if (from[count - 1] - from[0] == count - 1 && count == BLOCK) {
        h_.arithmetic.multiply(count, columns, depth, a, TILE, b, stride,
                               s.sums + (from[0] - first) * columns, columns, true);
      } else {
        h_.arithmetic.multiply(padded(count, LANES), columns, depth, a, TILE, b, stride, s.product, columns,
                               false);
        tile_kernels().add_rows(s.product, from, first, count, columns, s.sums);
      }
    }
  }

  Matrix h_, w_;
  at::Tensor target_, logp_, lse_, tile_lse_;
  std::optional<at::Tensor> entropy_;
  at::Tensor grad_logp_;
  std::optional<at::Tensor> grad_entropy_;
  std::vector<float> bias_;
  Head head_;
  int64_t T_, size_;
  Routing routing_;
  at::Tensor dhidden_, dweight_, dbias_, rest_, tokens_, gradients_, transposed_;
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_logp_backward(
    const at::Tensor& grad_logp, const std::optional<at::Tensor>& grad_entropy, const at::Tensor& hidden,
    const at::Tensor& weight, const at::Tensor& target, const at::Tensor& logp, const at::Tensor& lse,
    const at::Tensor& tile_lse, const std::optional<at::Tensor>& entropy, const std::optional<at::Tensor>& bias,
    double logit_scale, const std::optional<double> softcap, double temperature, int64_t ignore_index,
    double filter_eps, bool need_hidden, bool need_weight, bool need_bias, int64_t workspace_bytes) {
  const auto contiguous = [](const std::optional<at::Tensor>& x) {
    return x ? std::optional<at::Tensor>(x->to(at::kFloat).contiguous()) : std::nullopt;
  };
  const auto like = hidden.options();
  const at::Tensor dhidden = need_hidden ? at::empty({hidden.size(0), hidden.size(1)}, like) : at::Tensor();
  const at::Tensor dweight = need_weight ? at::empty({weight.size(0), weight.size(1)}, like) : at::Tensor();
  const at::Tensor dbias = need_bias && bias ? at::empty({weight.size(0)}, like) : at::Tensor();
  Backward backward(*contiguous(grad_logp), contiguous(grad_entropy), hidden, weight, target.contiguous(),
                    *contiguous(logp), *contiguous(lse), *contiguous(tile_lse), contiguous(entropy), bias,
                    head_of(logit_scale, softcap, temperature));
  const at::Tensor figures = backward.run(ignore_index, filter_eps, workspace_bytes, dhidden, dweight, dbias);
  const auto or_empty = [&](const at::Tensor& x) { return x.defined() ? x : at::empty({0}, like); };
  return {or_empty(dhidden), or_empty(dweight), or_empty(dbias), figures};
}

}  // namespace stepkto
