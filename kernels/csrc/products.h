// Matrix products into fp32, and what they multiply: see products.cpp.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "operands.h"
#include "tiles.h"

namespace stepkto {

inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// How inputs of one type are multiplied.
struct Arithmetic {
  const OperandKernels* pack;
  bool as_bf16;          // else as fp32
  int64_t input_size;    // bytes of an element of the inputs
  int64_t product_size;  // and of an operand

  explicit Arithmetic(at::ScalarType inputs);

  // K as the products want it
  int64_t depth(int64_t k) const { return as_bf16 ? padded(k, PAIR) : k; }

  // c (m, n; fp32) = a (m, k) @ b (k, n; packed), or += with `add`; k a multiple of PAIR for bf16
  void multiply(int64_t m, int64_t n, int64_t k, const void* a, int64_t a_stride, const void* b, int64_t b_stride,
                float* c, int64_t c_stride, bool add) const;
};

// A (rows, D) tensor whose rows are contiguous, and its pointers.
struct Matrix {
  at::Tensor tensor;
  Arithmetic arithmetic;
  int64_t rows, D, depth, stride;

  explicit Matrix(const at::Tensor& x);
  const void* row(int64_t i) const;
  // rows [first, first + count) as a left operand (count, depth): themselves where they can be read so, else copied
  const void* left(int64_t first, int64_t count, char* copy, int64_t& operand_stride) const;
  bool copies() const;
  // bytes of `copy` for a tile's rows
  int64_t copy_bytes() const { return copies() ? TILE * depth * arithmetic.product_size : 0; }
};

Head head_of(double logit_scale, const std::optional<double>& softcap, double temperature);

// Entries of the bias as fp32, or empty
std::vector<float> as_floats(const std::optional<at::Tensor>& bias);

// Tokens of a block such that its packed hidden states stay in a core's cache
int64_t tokens_of_block(int64_t bytes_per_token);

// After a thread's last product: gives back what the processor keeps for them
void release_products();

// Hands out parts of a thread's memory, or with no memory only counts them.
class Arena {
 public:
  explicit Arena(char* memory) : memory_(memory) {}
  template <typename T>
  T* take(int64_t count) {
    char* part = memory_ ? memory_ + used_ : nullptr;
    used_ += padded(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(part);
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// function(first, count) for the N tokens, LANES at a time
template <typename Function>
void for_lanes_of_tokens(int64_t N, int64_t grain, const Function& function) {
  at::parallel_for(0, (N + LANES - 1) / LANES, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) function(i * LANES, std::min(LANES, N - i * LANES));
  });
}

// function(unit, scratch) for every unit, whichever thread is free; each thread has a scratch of its own, made by
// make(arena), all in one allocation of the calling thread: allocators keep what other threads free.
template <typename Make, typename Function>
void for_each_unit(int64_t units, const Make& make, const Function& function) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), units);
  if (threads == 0) return;
  Arena counted(nullptr);
  make(counted);
  const int64_t bytes = counted.used();
  const std::unique_ptr<char[]> memory(new char[threads * bytes + 64]);
  char* begin_of_memory = memory.get();
  begin_of_memory += -reinterpret_cast<intptr_t>(begin_of_memory) & 63;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      Arena arena(begin_of_memory + thread * bytes);
      auto scratch = make(arena);
      for (int64_t unit = next++; unit < units; unit = next++) function(unit, scratch);
      release_products();
    }
  });
}

}  // namespace stepkto
